"""The demo model's vocabulary: complete in bytes, and encoded alike by everything that reads it."""

import random
from pathlib import Path

import pyrwkv_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.demo.data import world_vocab
from models.demo.vocab import PieceEncoder, build_vocab, read_vocab, write_vocab
from mrss_provider.evaluate.world import base_document
from mrss_provider.tokenizer import Tokenizer

PATH = Path(__file__).parents[2] / "models/demo/vocab.txt"
ENTRIES = read_vocab(PATH)
IDS = {token: index for index, token in enumerate(ENTRIES, start=1)}
PIECES = PieceEncoder(ENTRIES)
RUST = pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(PATH))
OURS = Tokenizer.load(PATH)


def greedy(text):
    """Longest match at every byte, by trying every length."""
    data, at, ids = text.encode(), 0, []
    while at < len(data):
        size = next(n for n in range(len(data) - at, 0, -1) if data[at : at + n] in IDS)
        ids.append(IDS[data[at : at + size]])
        at += size
    return ids


def test_it_has_every_byte_and_at_most_4096_entries_from_id_1():
    assert len(set(ENTRIES)) == len(ENTRIES) <= 4096
    assert {bytes([i]) for i in range(256)} <= set(ENTRIES)
    assert not [token for token in ENTRIES if not token]


@pytest.mark.slow
def test_the_file_is_what_the_world_gives():
    assert world_vocab() == ENTRIES


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_encoded_greedily_and_comes_back(text):
    wanted = greedy(text)
    assert PIECES.encode(text) == wanted
    assert list(RUST.encode(text)) == wanted
    assert OURS.encode(text) == wanted
    assert PIECES.decode(wanted) == text


def test_documents_are_encoded_greedily_with_few_tokens():
    rng = random.Random(2)
    for _ in range(30):
        text = base_document(rng).text
        ids = PIECES.encode(text)
        assert ids == greedy(text) == list(RUST.encode(text))
        assert len(ids) < len(text) / 3


def test_words_that_share_beginnings_and_spaces_are_not_confused():
    for text in ("  the", "bakeryx", " bak ery", "\n\n\n", "a\n\nb", "they'll", "UserUser:", " 42"):
        assert PIECES.encode(text) == greedy(text)


def test_the_frequent_pieces_are_kept_when_there_is_room_for_few(tmp_path):
    entries = build_vocab(["a cat, a cat, a dog"], max_entries=262, min_count=1)
    assert len(entries) == 262
    assert entries[:256] == [bytes([i]) for i in range(256)]
    assert entries[256:] == [b"\n\n", b"User", b"Assistant", b"System", b" a", b" cat"]
    write_vocab(tmp_path / "vocab.txt", entries)
    assert read_vocab(tmp_path / "vocab.txt") == entries


@pytest.mark.parametrize("token", [b"'\"", b"\\", b"\xff\xfe", "é".encode(), b"\r\n", b"  "])
def test_odd_tokens_survive_the_file(tmp_path, token):
    entries = [*[bytes([i]) for i in range(256)], token]
    write_vocab(tmp_path / "vocab.txt", entries)
    assert read_vocab(tmp_path / "vocab.txt") == entries
    rust = pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(tmp_path / "vocab.txt"))
    assert list(rust.encode("x" + token.decode(errors="ignore"))) == [
        121,
        *([257] if _is_text(token) else []),
    ]


def _is_text(token):
    return token.decode(errors="ignore").encode() == token
