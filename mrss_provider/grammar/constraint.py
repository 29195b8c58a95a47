"""GrammarConstraint: what one answer may say next, as llguidance sees it."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mrss_provider.errors import InvalidRequestError, MRSSError
from mrss_provider.grammar.vocabulary import Lead
from mrss_provider.tokenizer import EOS_ID

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

# More of them find the masks of a batch no sooner than the device has its logits.
_MAX_THREADS = 8
_OVER_LIMIT = ("too many", "; max is")
_TOO_COMPLEX = ("LexerTooComplex", "ParserTooComplex")


class GrammarConstraint:
    """Where one answer is in its grammar. One thread at a time; `fork` gives others their own.

    Attributes:
        num_words: of a mask: 32 tokens each.
        param: the key of the request that asked for the grammar.
        end_ids: tokens that mean the end of the text where the answer may end.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        num_words: int,
        param: str,
        *,
        lead: Lead | None = None,
        end_ids: tuple[int, ...] = (),
    ) -> None:
        """Begin an answer.

        Args:
            matcher: at the beginning of the grammar; this object's own.
            num_words: as the attribute.
            param: as the attribute.
            lead: what the first token may begin with and is no part of the answer.
            end_ids: as the attribute.
        """
        self.num_words = num_words
        self.param = param
        self.end_ids = end_ids
        self._matcher = matcher
        self._lead = lead

    def fork(self) -> GrammarConstraint:
        """Return another one at the same place."""
        return GrammarConstraint(
            self._matcher.deep_copy(),
            self.num_words,
            self.param,
            lead=self._lead,
            end_ids=self.end_ids,
        )

    @property
    def may_end(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Write which tokens may come next to `words` [ceil(V / 32)], bit i of word w is 32 w + i.

        The end of the text is token 0. Lets other threads of Python run.

        Raises:
            InvalidRequestError: the grammar is too much work.
        """
        if self._matcher.is_stopped():
            words[:] = 0
        else:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._finish(words)

    def fill_masks(
        self, together: Sequence[GrammarConstraint], masks: NDArray[np.uint32]
    ) -> list[MRSSError | None]:
        """Do as `fill_mask` for several at once, for the rows of `masks` [N, ceil(V / 32)].

        The work is shared by threads that are none of Python's.

        Returns:
            What each one's `fill_mask` would have raised.
        """
        each = list(enumerate(constraint._matcher for constraint in together))
        going = [(matcher, row) for row, matcher in each if not matcher.is_stopped()]
        if len(going) < len(each):
            masks[:] = 0
        if going:
            _executor().unsafe_compute_mask_ptr(
                going, masks.ctypes.data, masks.strides[0], len(masks)
            )
        return [constraint._met(words) for constraint, words in zip(together, masks, strict=True)]

    def _met(self, words: NDArray[np.uint32]) -> MRSSError | None:
        try:
            self._finish(words)
        except MRSSError as exc:
            return exc
        return None

    def _finish(self, words: NDArray[np.uint32]) -> None:
        """Add to a mask of the matcher's what it does not know of."""
        self._check()
        if self._lead is not None:
            self._allow_lead(words, self._lead)
        end = np.uint32(1)
        words[0] = words[0] | end if self.may_end else words[0] & ~end

    def advance(self, token_id: int) -> None:
        """Move on by a token that the mask allows, not the end.

        Raises:
            InvalidRequestError: it does not allow it, or the grammar is too much work.
        """
        rest: Sequence[int] | None = None
        if self._lead is not None:
            rest, self._lead = self._lead.rest_of(token_id), None
        taken = [token_id] if rest is None else list(rest)
        if EOS_ID in taken or not self._matcher.consume_tokens(taken):
            if self._is_too_complex:
                self._check()
            raise InvalidRequestError(f"{self.param} does not allow this text", param=self.param)

    def _allow_lead(self, words: NDArray[np.uint32], lead: Lead) -> None:
        """Let tokens in that are allowed without the lead, and none that begin with it as they are.

        So a token that begins with the lead always means the lead and an answer.
        """
        one = np.uint32(1)
        allowed = (words[lead.rests // 32] >> (lead.rests % 32).astype(np.uint32)) & one
        words &= ~lead.bits
        ids = lead.ids[allowed.astype(bool)]
        others = [
            token_id
            for token_id, rest in lead.others.items()
            if self._matcher.validate_tokens(list(rest)) == len(rest)
        ]
        alone = [] if lead.alone is None else [lead.alone]
        found = np.concatenate([ids, np.array([*others, *alone], dtype=np.int64)])
        np.bitwise_or.at(words, found // 32, one << (found % 32).astype(np.uint32))

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        why = "allows no answer from here on; it asks for what excludes itself"
        if self._is_too_complex:
            told = first_line(self._matcher.get_error())
            why = f"is too much work to follow ({told}); make it simpler"
        raise InvalidRequestError(f"{self.param} {why}", param=self.param)

    @property
    def _is_too_complex(self) -> bool:
        # Limits that are met while a mask is found are internal errors of its own to it.
        told = self._matcher.get_error().lower()
        is_over = any(sign in told for sign in _OVER_LIMIT)
        return is_over or self._matcher.stop_reason() in _TOO_COMPLEX


@functools.cache
def _executor() -> LLExecutor:
    # Here and not above: who never asks for a grammar does not pay for it.
    from llguidance import LLExecutor

    return LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


def first_line(message: str) -> str:
    """Return what llguidance says in one line, without marks of its own."""
    lines = [line.strip() for line in message.splitlines()]
    told = next((line for line in lines if line and not line.startswith("<")), "no reason given")
    return told if len(told) <= 200 else told[:197] + "..."
