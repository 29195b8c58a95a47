"""Text <-> token ids, without ever half a character. Imports no torch.

Two kinds of vocabulary: RWKV's World text format (`id 'literal' length` a line, greedy longest
match on bytes), and Hugging Face's `tokenizer.json` with byte-level tokens. Id 0 is always the end
of text.
"""

from __future__ import annotations

import ast
import codecs
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrss_provider.errors import InvalidRequestError, ModelFileError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EOS_ID = 0
"""The end of text, whatever a Hugging Face file says of it."""

_WORLD_FILE = "rwkv_vocab_v20230424.txt"
# Tables by id are as long as the largest; no model has so many rows of logits.
_MAX_ID = 1 << 24
# What ast.literal_eval may raise.
_BAD_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)
_PATTERNS = ("vocab.txt", "rwkv_vocab*.txt", "tokenizer.json")


def find_vocabulary(model: Path) -> Path | None:
    """Return the vocabulary in a model's folder or beside a model's file, None without one."""
    folder = model if model.is_dir() else model.parent
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    return None


def world_vocabulary() -> Path:
    """Return the file of the World vocabulary (65,529 entries), which pyrwkv_tokenizer brings."""
    spec = find_spec("pyrwkv_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / _WORLD_FILE


class Tokenizer:
    """One vocabulary.

    Attributes:
        eos_id: 0, the end of text.
        path: the file it was read from.
    """

    eos_id = EOS_ID

    def __init__(
        self, path: Path, table: dict[int, bytes], encode: Callable[[str], list[int]]
    ) -> None:
        """Use `Tokenizer.load`."""
        self.path = path
        self._table = table
        self._encode = encode

    @classmethod
    def load(cls, path: Path | None = None) -> Tokenizer:
        """Read a vocabulary.

        Args:
            path: World text format, or `tokenizer.json`; None is the World vocabulary.

        Raises:
            ModelFileError: not such a file, or one that lacks a byte.
        """
        path = world_vocabulary() if path is None else path
        if not path.is_file():
            raise ModelFileError(
                f"the vocabulary {path} does not exist; give a World vocabulary (.txt) or a "
                f"tokenizer.json"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelFileError(f"the vocabulary {path} is no readable UTF-8 text") from exc
        if path.suffix == ".json":
            return cls(path, *_read_huggingface(path, text))
        table = _read_world(path, text)
        return cls(path, table, _world_encoder(path))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without any beginning or end token.

        Raises:
            InvalidRequestError: text that has no UTF-8 form (a lone surrogate).
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError as exc:
            raise InvalidRequestError(
                f"text must be valid Unicode, got the lone surrogate {text[exc.start]!r} at "
                f"position {exc.start}"
            ) from exc

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return a token's bytes; None for 0 and for ids without an entry."""
        return self._table.get(token_id)

    def entries(self) -> Mapping[int, bytes]:
        """Return the vocabulary: id -> bytes, not to be modified."""
        return self._table

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """Return the tokens' bytes joined; ids without bytes (0 too) add nothing."""
        return b"".join(self._table.get(token_id, b"") for token_id in token_ids)

    def byte_starts(self, token_ids: Sequence[int]) -> tuple[bytes, NDArray[np.int64]]:
        """Return what `decode_bytes` does, and before how many of its bytes each token begins.

        For long prompts: some 1.5 ms for 34,000 tokens.

        Args:
            token_ids: any, N of them.

        Returns:
            The bytes, and their number before each token [N], int64.
        """
        import numpy as np

        pieces, lengths = self._arrays
        ids = np.fromiter(token_ids, np.int64, len(token_ids))
        # Ids without an entry are as long as 0, which has none.
        ids = np.where((ids >= 0) & (ids < len(lengths)), ids, EOS_ID)
        sizes = lengths[ids]
        return b"".join(pieces[ids].tolist()), np.cumsum(sizes) - sizes

    @functools.cached_property
    def _arrays(self) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
        """The bytes of each id, and how many they are."""
        import numpy as np

        size = max(self._table, default=EOS_ID) + 1
        pieces = np.array([self._table.get(i, b"") for i in range(size)], dtype=object)
        return pieces, np.array([len(piece) for piece in pieces], np.int64)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the tokens' text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(token_ids).decode("utf-8", "replace")

    def allowed_ids(self, vocab_size: int) -> list[int]:
        """Return the ids to sample from among `vocab_size` logits, ascending: entries, and 0."""
        return [EOS_ID, *sorted(i for i in self._table if 0 < i < vocab_size)]

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder for one answer."""
        return StreamDecoder(self)


class StreamDecoder:
    """Tokens to text, some at a time; a character comes out when its last byte is in.

    Attributes:
        rest: the unfinished character; set again, what was pushed since is forgotten.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Looked up without a call of ours: a server does this for every token.
        self._bytes_of = tokenizer.entries().get
        self.rest = b""

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; return the characters that they complete, maybe none."""
        data = self.rest + b"".join([self._bytes_of(i, b"") for i in token_ids])
        text, num_read = codecs.utf_8_decode(data, "replace", False)
        self.rest = data[num_read:]
        return text

    def flush(self) -> str:
        """End the text; return U+FFFD if an unfinished character is left, else nothing."""
        data, self.rest = self.rest, b""
        return data.decode("utf-8", "replace")


def _read_world(path: Path, text: str) -> dict[int, bytes]:
    """Parse `id literal length` lines, the literal being Python text or bytes.

    Raises:
        ModelFileError: naming the first bad line, or a byte that no token encodes.
    """
    table: dict[int, bytes] = {}
    # Only "\n" ends a line: literals may hold other separators that str.splitlines would cut at.
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        try:
            token_id, token = _parse_line(line)
        except _BAD_LITERAL as exc:
            raise ModelFileError(
                f"line {number} of the vocabulary {path} is not `id 'literal' length`, got "
                f"{line[:60]!r}"
            ) from exc
        if token_id <= 0 or token_id in table:
            what = "given twice" if token_id in table else "not above 0 (0 is the end of text)"
            raise ModelFileError(f"line {number} of the vocabulary {path}: id {token_id} is {what}")
        table[token_id] = token
    if len(set(table.values())) != len(table):
        raise ModelFileError(f"the vocabulary {path} has two ids for the same bytes")
    _check_table(path, table)
    return table


def _check_table(path: Path, table: dict[int, bytes]) -> None:
    """Refuse absurd ids, and a vocabulary that cannot encode every text.

    Encoders drop bytes that they do not know silently.
    """
    largest = max(table, default=EOS_ID)
    if largest > _MAX_ID:
        raise ModelFileError(f"the vocabulary {path} may have ids up to {_MAX_ID}, got {largest}")
    tokens = set(table.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise ModelFileError(
            f"the vocabulary {path} lacks {len(missing)} of the 256 single bytes (first: "
            f"0x{missing[0]:02x}), so some text cannot be encoded"
        )


def _parse_line(line: str) -> tuple[int, bytes]:
    first, last = line.index(" "), line.rindex(" ")
    literal = line[first + 1 : last].strip()
    if "\\" not in literal and literal[:1] == "'" and literal.find("'", 1) == len(literal) - 1:
        # The common case, 20 times faster than the general one.
        token = literal[1:-1].encode()
    else:
        value = ast.literal_eval(literal)
        if not isinstance(value, str | bytes):
            raise ValueError(literal)
        token = value.encode() if isinstance(value, str) else value
    if not token or len(token) != int(line[last:]):
        raise ValueError(line)
    return int(line[:first]), token


def _world_encoder(path: Path) -> Callable[[str], list[int]]:
    # Encoding only: its decode panics on incomplete characters and on ids without an entry.
    from pyrwkv_tokenizer import RWKVTokenizer

    try:
        encode: Callable[[str], list[int]] = RWKVTokenizer(vocab_filepath=str(path)).encode
    except BaseException as exc:
        # It panics at a literal that Python takes and it does not.
        if type(exc).__name__ != "PanicException":
            raise
        raise ModelFileError(f"the encoder cannot read the vocabulary {path}: {exc}") from exc
    return encode


def _read_huggingface(path: Path, text: str) -> tuple[dict[int, bytes], Callable[[str], list[int]]]:
    """Read a `tokenizer.json` whose tokens are written in the byte-level alphabet.

    Raises:
        ModelFileError: not such a file.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        decoder = json.loads(text).get("decoder")
        tokenizer = HuggingFaceTokenizer.from_str(text)
    except Exception as exc:
        # `tokenizers` raises bare Exception for every malformed file.
        raise ModelFileError(f"{path} is not a tokenizer.json: {exc}") from exc
    if not _is_byte_level(decoder):
        kind = decoder.get("type") if isinstance(decoder, dict) else decoder
        raise ModelFileError(
            f"{path} has a {kind} decoder; needed is a byte-level one, whose tokens are bytes"
        )
    alphabet = _byte_alphabet()
    added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
    table = {
        i: bytes(alphabet[char] for char in token)
        for token, i in tokenizer.get_vocab(with_added_tokens=False).items()
        if i not in added and all(char in alphabet for char in token)
    }
    table |= {i: content.encode() for i, content in added.items()}
    table.pop(EOS_ID, None)
    _check_table(path, table)
    return table, lambda text: _encode_huggingface(tokenizer, text)


def _encode_huggingface(tokenizer: Any, text: str) -> list[int]:
    text.encode("utf-8")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts or [])


def _byte_alphabet() -> dict[str, int]:
    """Return the byte-level alphabet of GPT-2: printable characters that stand for bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
