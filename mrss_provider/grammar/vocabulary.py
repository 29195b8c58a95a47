"""A model's vocabulary as llguidance has it, and the tokens that begin and end its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mrss_provider.tokenizer import EOS_ID, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# What llguidance shows of the end of text; no text can spell it.
_EOS_BYTES = b"<|endoftext|>"


class Vocabulary:
    """The tokens of one model.

    Attributes:
        tokens: for llguidance; an id without an entry has no bytes and is never allowed.
        num_words: 32-bit words in a mask.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Build it, which takes a fifth of a second for 65,536 entries.

        Args:
            tokenizer: of the model.
            vocab_size: logits that the model gives.
        """
        # Here and not above: who never asks for a grammar does not pay for it.
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._leads: dict[str, Lead] = {}
        self._ends: dict[tuple[str, ...], tuple[int, ...]] = {}
        self.num_words = -(-vocab_size // 32)
        entries = tokenizer.entries()
        tokens = [entries.get(i, b"") for i in range(vocab_size)]
        tokens[EOS_ID] = _EOS_BYTES
        self.tokens: LLTokenizer = LLTokenizer(
            TokenizerWrapper(_Encoder(tokens, tokenizer.encode)), n_vocab=vocab_size, eos_token=0
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._tokenizer.encode(text)

    def lead(self, text: str) -> Lead:
        """Return the tokens that begin with `text`, which a model writes before its answer."""
        found = self._leads.get(text)
        if found is None:
            found = self._leads[text] = _make_lead(self._tokenizer, self._vocab_size, text)
        return found

    def ends(self, stops: tuple[str, ...]) -> tuple[int, ...]:
        """Return the tokens that are one of `stops`, by their bytes."""
        if stops not in self._ends:
            texts = {stop.encode() for stop in stops}
            entries = self._tokenizer.entries().items()
            self._ends[stops] = tuple(i for i, token in entries if token in texts)
        return self._ends[stops]


class _Encoder:
    """What llguidance wants to know of a tokeniser."""

    eos_token_id = EOS_ID
    bos_token_id = None
    special_token_ids = (EOS_ID,)

    def __init__(self, tokens: list[bytes], encode: Callable[[str], list[int]]) -> None:
        self.tokens = tokens
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)


@dataclass(frozen=True)
class Lead:
    """The tokens that begin with a lead, and what is left of them without it.

    Attributes:
        alone: the token that is the lead, or None.
        ids: of those whose rest is a token.
        rests: those tokens.
        others: those whose rest is several tokens.
        bits: all of them, as a mask.
    """

    alone: int | None
    ids: NDArray[np.int64]
    rests: NDArray[np.int64]
    others: Mapping[int, tuple[int, ...]]
    bits: NDArray[np.uint32]

    def rest_of(self, token_id: int) -> tuple[int, ...] | None:
        """Return what is left of a token without the lead; None if it does not begin with it."""
        if token_id == self.alone:
            return ()
        found = np.flatnonzero(self.ids == token_id)
        if len(found):
            return (int(self.rests[found[0]]),)
        return self.others.get(token_id)


def _make_lead(tokenizer: Tokenizer, vocab_size: int, text: str) -> Lead:
    lead = text.encode()
    entries = {i: token for i, token in tokenizer.entries().items() if i < vocab_size}
    id_of = {token: i for i, token in entries.items()}
    ids: list[int] = []
    rests: list[int] = []
    others: dict[int, tuple[int, ...]] = {}
    for token_id, token in entries.items():
        rest = token[len(lead) :]
        if not token.startswith(lead) or not rest:
            continue
        if rest in id_of:
            ids.append(token_id)
            rests.append(id_of[rest])
        else:
            # Bytes of one token, which need be no text.
            others[token_id] = tuple(id_of[bytes([byte])] for byte in rest)
    alone = id_of.get(lead)
    found = [*ids, *others, *([] if alone is None else [alone])]
    bits = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    np.bitwise_or.at(bits, np.array(found, dtype=np.int64) // 32, _bit(found))
    return Lead(alone, np.array(ids, np.int64), np.array(rests, np.int64), others, bits)


def _bit(token_ids: list[int]) -> NDArray[np.uint32]:
    shift = np.array(token_ids, dtype=np.uint32) % np.uint32(32)
    bits: NDArray[np.uint32] = np.left_shift(np.uint32(1), shift, dtype=np.uint32)
    return bits
