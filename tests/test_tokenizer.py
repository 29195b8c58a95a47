"""The tokenizer against a greedy longest match written out, and the `rwkv` package's vocabulary."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TINY, vocabulary, write_vocabulary
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mrss_provider.errors import InvalidRequestError, ModelFileError
from mrss_provider.tokenizer import StreamDecoder, Tokenizer, find_vocabulary, world_vocabulary

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PIECES = st.lists(
    st.sampled_from(
        ["hello", " world", "\n\n", "User:", "'", '"', "\\", "'\"", "b'x'", "é", "今天", "😀",
         "\u2028", "\u0085", "\r\n", "\x00", " " * 9, "z"]
    ),
    max_size=30,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return Tokenizer.load()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tokenizer.load(write_vocabulary(tmp_path_factory.mktemp("v") / "v.txt", vocabulary()))


@pytest.fixture(scope="module")
def huggingface_file(tmp_path_factory):
    """A byte-level BPE that merges a few pairs, with an end of text that is not id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i + 1 for i, token in enumerate([*alphabet, "he", "ll", "hell", "Ġw"])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab={"<pad>": 0, **vocab}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@functools.cache
def ids_by_bytes(tokenizer):
    return {tokenizer.token_bytes(i): i for i in tokenizer.allowed_ids(65536)[1:]}


def longest_match(tokenizer, text):
    """The ids of the longest entries, from the left."""
    by_bytes = ids_by_bytes(tokenizer)
    longest = max(map(len, by_bytes))
    data, ids = text.encode(), []
    while data:
        size = next(n for n in range(longest, 0, -1) if data[:n] in by_bytes)
        ids.append(by_bytes[data[:size]])
        data = data[size:]
    return ids


@settings(max_examples=150, deadline=None)
@given(text=TEXTS | PIECES)
def test_world_text_is_matched_greedily_and_comes_back(world, tiny, text):
    for tokenizer in (world, tiny):
        ids = tokenizer.encode(text)
        assert ids == longest_match(tokenizer, text)
        assert tokenizer.decode(ids) == text


def test_the_world_vocabulary_is_the_packages(world):
    folder = Path(next(iter(importlib.util.find_spec("rwkv").submodule_search_locations)))
    other = Tokenizer.load(folder / "rwkv_vocab_v20230424.txt")
    ids = world.allowed_ids(65536)
    assert ids == other.allowed_ids(65536) == list(range(65530))
    assert all(world.token_bytes(i) == other.token_bytes(i) for i in ids)
    tokens = [world.token_bytes(i) for i in ids[1:]]
    assert sum(token.decode("utf-8", "ignore").encode() != token for token in tokens) == 486
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)


def test_only_entries_and_the_end_of_text_may_be_sampled(world, tiny):
    assert world.eos_id == 0
    assert world.allowed_ids(65536)[-1] == 65529
    assert world.allowed_ids(100) == list(range(100))
    assert tiny.allowed_ids(TINY.vocab_size) == [0, *vocabulary()]
    assert len(vocabulary()) < TINY.vocab_size - 1


def test_ids_without_an_entry_have_no_bytes(world):
    assert world.token_bytes(0) is None
    assert world.token_bytes(65530) is None
    assert world.decode_bytes([0, 65535, 10**9]) == b""
    assert world.encode("") == []


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 65535) | st.integers(1, 256), max_size=40))
def test_streaming_any_ids_equals_decoding_them_at_once(world, ids):
    decoder = world.stream_decoder()
    pieces = [decoder.push([token_id]) for token_id in ids]
    assert "".join([*pieces, decoder.flush()]) == world.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text))
def test_streaming_never_shows_half_a_character(tiny, text):
    decoder = StreamDecoder(tiny)
    pieces = [decoder.push([token_id]) for token_id in tiny.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == text
    assert decoder.flush() == ""


def test_an_unfinished_character_shows_only_at_the_end(tiny):
    decoder = tiny.stream_decoder()
    assert [decoder.push([byte + 1]) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"


@given(st.lists(st.integers(-1, 70000) | st.integers(0, 300), max_size=30))
def test_tokens_begin_where_the_bytes_of_those_before_end(world, ids):
    data, starts = world.byte_starts(ids)
    assert data == world.decode_bytes(ids)
    before = [len(world.decode_bytes(ids[:num])) for num in range(len(ids))]
    assert starts.tolist() == before


def test_a_lone_surrogate_is_refused(world, huggingface_file):
    for tokenizer in (world, Tokenizer.load(huggingface_file)):
        with pytest.raises(InvalidRequestError, match=r"lone surrogate '\\ud800' at position 2"):
            tokenizer.encode("ab\ud800")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS | PIECES)
def test_a_huggingface_vocabulary_round_trips(huggingface_file, text):
    tokenizer = Tokenizer.load(huggingface_file)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.stream_decoder()
    assert "".join([*(decoder.push([i]) for i in ids), decoder.flush()]) == text


def test_a_huggingface_vocabularys_ids_and_end(huggingface_file):
    tokenizer = Tokenizer.load(huggingface_file)
    ids = tokenizer.encode("hell w")
    assert [tokenizer.token_bytes(i) for i in ids] == [b"hell", b" w"]
    assert tokenizer.eos_id == 0
    assert tokenizer.token_bytes(0) is None
    assert tokenizer.allowed_ids(1000) == list(range(262))
    assert tokenizer.token_bytes(261) == b"<|im_end|>"


def test_a_vocabulary_is_found_beside_its_model(tmp_path):
    assert find_vocabulary(tmp_path) is None
    for name in ("tokenizer.json", "rwkv_vocab_v1.txt", "vocab.txt"):
        (tmp_path / name).touch()
        assert find_vocabulary(tmp_path) == tmp_path / name
        assert find_vocabulary(tmp_path / "model.pth") == tmp_path / name


ALL_BYTES = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 of the vocabulary .* is not `id 'literal' length`, got ''"),
        ("hello\n", "line 1 .* got 'hello'"),
        (ALL_BYTES + "300 'ab' 3\n", "line 257 .* got \"300 'ab' 3\""),
        (ALL_BYTES + "300 '' 0\n", "line 257 "),
        (ALL_BYTES + "300 ab 2\n", "line 257 "),
        (ALL_BYTES + "300 1\n", "line 257 .* got '300 1'"),
        (ALL_BYTES + "300 {[]:1} 4\n", "line 257 .* got '300 {\\[\\]:1} 4'"),
        (ALL_BYTES + "300 12 2\n", "line 257 "),
        (ALL_BYTES + "300 __import__('os') 2\n", "line 257 "),
        (ALL_BYTES + "\n300 'ab' 2\n", "line 257 .* got ''"),
        (ALL_BYTES + "9 'ab' 2\n", "line 257 .*: id 9 is given twice"),
        (ALL_BYTES + "0 'ab' 2\n", r"line 257 .*: id 0 is not above 0 \(0 is the end of text\)"),
        (ALL_BYTES + "300 'a' 1\n", "has two ids for the same bytes"),
        (ALL_BYTES + "1000000000 'ab' 2\n", "may have ids up to 16777216, got 1000000000"),
        ("1 'a' 1\n2 'b' 1\n", r"lacks 254 of the 256 single bytes \(first: 0x00\)"),
    ],
)
def test_a_bad_world_vocabulary_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "vocab.txt"
    path.write_text(text)
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.load(path)
    assert "vocab.txt" in str(caught.value)


def without_decoder(data):
    return data | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}


def without_a_byte(data):
    del data["model"]["vocab"]["a"]
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_decoder, "has a WordPiece decoder; needed is a byte-level one"),
        (without_a_byte, r"lacks 1 of the 256 single bytes \(first: 0x61\)"),
        (lambda data: {"a": 1}, "is not a tokenizer.json"),
        (lambda data: [], "is not a tokenizer.json"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(tmp_path, huggingface_file, change, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(huggingface_file.read_text()))))
    with pytest.raises(ModelFileError, match=message):
        Tokenizer.load(path)


def test_a_missing_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"none.txt does not exist; give a World vocabulary"):
        Tokenizer.load(tmp_path / "none.txt")
    (tmp_path / "v.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFileError, match="is no readable UTF-8 text"):
        Tokenizer.load(tmp_path / "v.txt")


def test_a_vocabulary_with_windows_line_ends_is_read(tmp_path, tiny):
    path = write_vocabulary(tmp_path / "v.txt", vocabulary())
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    windows = Tokenizer.load(path)
    assert windows.encode("hello\r\n world 今") == tiny.encode("hello\r\n world 今")


def test_importing_the_tokenizer_imports_no_torch():
    code = "import sys, mrss_provider.tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_world_vocabulary_is_found_without_loading_it():
    assert world_vocabulary().is_file()
