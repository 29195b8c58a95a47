"""The demo model's vocabulary: words of the corpus and every single byte, in the World text format.

One line an entry: `id repr(text or bytes) byte_length`, ids from 1; id 0 is the end of text.
Tokens never reach over the border of a piece (` word`, a run of newlines, ...), so that greedy
longest match on a whole text equals greedy longest match on its pieces, which can be cached.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

PIECE = re.compile(r" ?[A-Za-z]+(?:'[a-z]+)?| ?[0-9]+|\n+| ?[^A-Za-z0-9\n ]| ")

ALWAYS = ("\n\n", "User", "Assistant", "System", ":", " ")


def build_vocab(texts: Iterable[str], max_entries: int, min_count: int) -> list[bytes]:
    """Return the entries for ids 1, 2, ...: 256 bytes, then the pieces of `texts` by frequency."""
    counts = Counter(piece for text in texts for piece in PIECE.findall(text))
    entries = [bytes([i]) for i in range(256)]
    known = set(entries)
    frequent = [p for p, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])) if n >= min_count]
    for piece in (*ALWAYS, *frequent):
        token = piece.encode()
        if len(entries) == max_entries:
            break
        if token not in known:
            known.add(token)
            entries.append(token)
    return entries


def write_vocab(path: Path, entries: list[bytes]) -> None:
    """Write the World text format that the `rwkv` package and `pyrwkv_tokenizer` read."""
    lines = []
    for index, token in enumerate(entries, start=1):
        try:
            shown = repr(token.decode())
        except UnicodeDecodeError:
            shown = repr(token)
        lines.append(f"{index} {shown} {len(token)}\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_vocab(path: Path) -> list[bytes]:
    """Read a file of `write_vocab`: the entries for ids 1, 2, ..."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        shown = ast.literal_eval(line[line.index(" ") : line.rindex(" ")].strip())
        entries.append(shown.encode() if isinstance(shown, str) else shown)
    return entries


class PieceEncoder:
    """Greedy longest match with a cache by piece: fast enough to feed an accelerator."""

    def __init__(self, entries: list[bytes]) -> None:
        self._ids = {token: index for index, token in enumerate(entries, start=1)}
        self._bytes = [b"", *entries]
        self._longest = max(len(token) for token in entries)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = []
        for piece in PIECE.findall(text):
            known = self._cache.get(piece)
            if known is None:
                known = self._cache[piece] = self._match(piece.encode())
            ids += known
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; ids without an entry are nothing, bad UTF-8 is replaced."""
        known = (self._bytes[i] for i in ids if i < len(self._bytes))
        return b"".join(known).decode(errors="replace")

    def _match(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            size = min(self._longest, len(data) - at)
            while data[at : at + size] not in self._ids:
                size -= 1
            ids.append(self._ids[data[at : at + size]])
            at += size
        return ids
