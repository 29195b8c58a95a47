"""Which tokens may end a turn."""

import pytest
from tiny_model import vocabulary, write_vocabulary

from mrss_provider.async_engine.pauses import pause_ids
from mrss_provider.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    return Tokenizer.load(write_vocabulary(path, vocabulary()))


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("\n\n",), {b"\n", b"\n\n", b"\r\n"}),
        (("User:",), {b"U", b"User:"}),
        (("a", "hello"), {b"a", b"h", b" the"}),
        ((), set()),
    ],
)
def test_pauses_hold_a_stop_string_or_begin_one(tokenizer, stops, expected):
    found = {tokenizer.token_bytes(token_id) for token_id in pause_ids(tokenizer, stops)}
    whole = {
        token for token in tokenizer.entries().values() if any(s.encode() in token for s in stops)
    }
    assert found == expected | whole
