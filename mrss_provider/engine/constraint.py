"""What a grammar leaves an answer: the tokens that may be drawn, found while the model computes.

The engine sees token ids and bits; what a grammar is, it does not know.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrss_provider.engine.request import EOS_ID
from mrss_provider.errors import EngineError, InvalidRequestError, MRSSError

log = logging.getLogger(__name__)

# Less work than it is to hand it to another thread and hear of its end.
_MIN_HANDED_S = 2e-4
# Fewer masks are found one after the other: several threads take their time to get going.
_MIN_TOGETHER = 4


class Constraint(Protocol):
    """Where one answer is in what it must conform to. One thread at a time.

    Attributes:
        num_words: of a mask: 32 tokens each.
        param: the key of the request that asked for it.
        end_ids: tokens that mean the end of the text where the answer may end.
    """

    num_words: int
    param: str
    end_ids: tuple[int, ...]

    def fork(self) -> Constraint:
        """Return another one at the same place."""
        ...

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Write which tokens may come next: bit i of word w is token 32 w + i.

        Token 0, the end of the text, is among them where the answer may end.

        Raises:
            MRSSError: it is too much work.
        """
        ...

    def fill_masks(
        self, together: Sequence[Self], masks: NDArray[np.uint32]
    ) -> list[MRSSError | None]:
        """Write the masks of several constraints of this class to `masks` [N, num_words] at once.

        Returns:
            What `fill_mask` would have raised for each.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Move on by a token that the mask allows, not the end.

        Raises:
            MRSSError: it is too much work.
        """
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        ...


class AllowedTokens:
    """The tokens that one answer may get next.

    Attributes:
        end_ids: tokens that mean the end of the text where the answer may end.
        words: the mask that `look` found, uint32 [ceil(V / 32)].
        error: what ends the answer instead of a token; None if there is one.
        look_s: seconds that the last `look` took, its share where several were found at once; many
            before the first.
    """

    def __init__(self, constraint: Constraint, banned: Sequence[int]) -> None:
        """Begin an answer.

        Args:
            constraint: the answer's own.
            banned: tokens that its request bans.
        """
        self._constraint = constraint
        self.end_ids = constraint.end_ids
        self.words = np.zeros(constraint.num_words, dtype=np.uint32)
        self.error: MRSSError | None = None
        self.look_s = 1.0
        self._is_over = False
        self._wanted = ~mask_of(banned, constraint.num_words)
        self._has_bans = bool(banned)

    def advance(self, token_id: int) -> bool:
        """Move on by a token that was drawn; return whether the answer is complete with it.

        An error is kept for the next token, which is not to come then.
        """
        try:
            if token_id != EOS_ID:
                self._constraint.advance(token_id)
        except Exception as exc:
            self.error = _told(exc)
            return False
        self._is_over = token_id == EOS_ID or self._constraint.is_complete
        return self._is_over

    def look(self) -> None:
        """Find the next token's mask, or why there is none. Lets other threads of Python run."""
        if not self._is_wanted:
            return
        started = time.perf_counter()
        try:
            self._constraint.fill_mask(self.words)
        except Exception as exc:
            self.error = _told(exc)
            return
        self._found(time.perf_counter() - started)

    @staticmethod
    def look_together(answers: Sequence[AllowedTokens]) -> None:
        """Do as `look` for several answers at once."""
        by_kind: dict[type, list[AllowedTokens]] = defaultdict(list)
        for answer in answers:
            if answer._is_wanted:
                by_kind[type(answer._constraint)].append(answer)
        for own in by_kind.values():
            if len(own) < _MIN_TOGETHER:
                for answer in own:
                    answer.look()
                continue
            started = time.perf_counter()
            constraints = [answer._constraint for answer in own]
            masks = np.empty((len(own), constraints[0].num_words), dtype=np.uint32)
            try:
                errors = constraints[0].fill_masks(constraints, masks)
            except Exception:
                log.exception("masks could not be found together; they are found one by one")
                for answer in own:
                    answer.look()
                continue
            share_s = (time.perf_counter() - started) / len(own)
            for answer, mask, error in zip(own, masks, errors, strict=True):
                answer.words, answer.error = mask, error
                if error is None:
                    answer._found(share_s)

    @property
    def _is_wanted(self) -> bool:
        # A step may have been planned for an answer that has ended since.
        return not self._is_over and self.error is None

    def _found(self, seconds: float) -> None:
        self.look_s = seconds
        if self._has_bans:
            self.words &= self._wanted
        if not self.words.any():
            self.error = InvalidRequestError(
                f"{self._constraint.param} leaves no token to go on with that logit_bias does not "
                "ban; ban fewer tokens",
                param=self._constraint.param,
            )

    @property
    def ends(self) -> list[int]:
        """Tokens that mean the end here: it may come, and the grammar has no other use for them."""
        may_end = bool(self.words[0] & np.uint32(1))
        return [i for i in self.end_ids if not _has(self.words, i)] if may_end else []

    def pack(self, row: NDArray[np.int32]) -> None:
        """Write the mask that `look` found to a row of the tail's `TailInputs.allowed`.

        It leaves nothing where there is an error.
        """
        words, ends = row[: len(self.words)].view(np.uint32), row[len(self.words) :]
        ends[:] = -1
        if self.error is not None:
            words[:] = 0
            return
        words[:] = self.words
        # A token that the request bans adds nothing to the end.
        found = [i for i in self.ends if _has(self._wanted, i)]
        for n, token_id in enumerate(found):
            ends[n] = token_id
            words[token_id // 32] |= np.uint32(1 << token_id % 32)


class MaskWorkers:
    """A thread that finds masks while the caller's waits for the model. None until it is needed."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def looking(self, answers: Sequence[AllowedTokens | None]) -> Iterator[None]:
        """Find the masks of some answers while the body runs; they are there after it.

        Those that took next to no time before are found behind it, and so are all where no other
        thread takes them.
        """
        wanted = [answer for answer in answers if answer is not None]
        is_handed = sum(answer.look_s for answer in wanted) >= _MIN_HANDED_S
        under_way = self._hand_over(wanted) if is_handed else None
        try:
            yield
        finally:
            if under_way is not None:
                under_way.result()
        if under_way is None:
            AllowedTokens.look_together(wanted)

    def _hand_over(self, answers: Sequence[AllowedTokens]) -> Future[None] | None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="mrss-masks")
        try:
            return self._pool.submit(AllowedTokens.look_together, answers)
        except RuntimeError:
            # The interpreter ends, which it tells its threads' pools before it ends this thread, or
            # there is no other thread to be had. What the pool may have queued is never begun.
            self._pool = None
            return None


def _told(error: Exception) -> MRSSError:
    """Return what ends one answer, and no other, where its grammar raised `error`."""
    if isinstance(error, MRSSError):
        return error
    log.error("a grammar failed and ends its answer", exc_info=error)
    return EngineError(f"the grammar failed: {type(error).__name__}: {error}")


def mask_of(token_ids: Sequence[int], num_words: int) -> NDArray[np.uint32]:
    """Return a mask [num_words] with the bits of some tokens."""
    words = np.zeros(num_words, dtype=np.uint32)
    ids = np.array(token_ids, dtype=np.int64)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return words


def constrain(
    logits: Tensor,
    rows: Sequence[Sequence[int]],
    answers: Sequence[AllowedTokens | None],
) -> None:
    """Set what each answer may not get to -inf in its rows of `logits` [B, V], *modified*.

    Where the answer may end and the grammar has no other use for its `end_ids`, their probability
    becomes that of the end. Answers that share rows share their mask.
    """
    done: set[int] = set()
    for own, answer in zip(rows, answers, strict=True):
        if answer is None or answer.error is not None or own[0] in done:
            continue
        done.update(own)
        at = slice(own[0], own[0] + len(own))
        if list(own) == list(range(at.start, at.stop)):
            _constrain_rows(logits[at], answer)
        else:
            for row in own:
                _constrain_rows(logits[row : row + 1], answer)


def _constrain_rows(logits: Tensor, answer: AllowedTokens) -> None:
    ends = answer.ends
    if ends:
        logits[:, EOS_ID] = logits[:, [EOS_ID, *ends]].logsumexp(-1)
    bits = np.unpackbits((~answer.words).view(np.uint8), bitorder="little")
    banned = torch.from_numpy(bits[: logits.shape[-1]]).view(torch.bool)
    logits.masked_fill_(banned.to(logits.device), -torch.inf)


def _has(words: NDArray[np.uint32], token_id: int) -> bool:
    return bool(words[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))
