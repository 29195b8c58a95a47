"""What runs: requests with slots, their answers, and what one step does for them.

The scheduler makes and changes these; a runner reads them, and adds what it learns on the way: how
likely each row finds what the user wrote.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mrss_provider.backend import FinishReason
from mrss_provider.engine.constraint import AllowedTokens
from mrss_provider.engine.gates import Heard, gate_of, named_weights
from mrss_provider.engine.lazy_rows import LazyRows
from mrss_provider.engine.logits_processors import Bias, Occurrences
from mrss_provider.engine.prompt_reader import PromptNotes
from mrss_provider.engine.reinjection import next_stop
from mrss_provider.engine.request import EOS_ID, MAX_EVIDENCE, EngineRequest, ResolvedMixture

if TYPE_CHECKING:
    from mrss_provider.model import StateSnapshot


KEEP_EVERY = 512
"""Tokens of an answer between two copies of its rows while it runs. A copy moves a whole row: every
32 tokens they would be a good part of a GPU's time."""


@dataclass(eq=False)
class Choice:
    """One answer of a running request.

    Attributes:
        slots: one a row of the request's mixture.
        lazy: keeps its rows, if some may sleep.
        last_token: the last one committed: what the rows read next, unless steps are under way.
        num_sampled: tokens committed.
        num_planned: tokens committed and those of steps under way.
        num_launched: steps that have been launched for it, from the one that reads the end of the
            prompt on.
        answer: the tokens committed.
        keep_at: of how many tokens on its rows are worth keeping for later.
        is_steady: whether `mixture` is the same for every token after the first.
        mixture: the request's as it is in the step that was planned last: the weights are those of
            the moment, and rows that sleep are left out.
        own_evidence: log-probabilities [K] of the last committed tokens, for a gate that reads the
            answer.
        num_reread: tokens of prompt and answer that its rows will have read again after the steps
            planned; None unless their states were lost.
        is_stateless: whether its rows must take their initial states first.
        is_live: whether the answer has neither finished nor been dropped.
        allowed: what it may say, if a grammar constrains it.
    """

    owner: Running
    index: int
    slots: list[int]
    occurrences: Occurrences | None
    lazy: LazyRows | None = None
    last_token: int = EOS_ID
    num_sampled: int = 0
    num_planned: int = 0
    num_launched: int = 0
    answer: list[int] = field(default_factory=list)
    keep_at: int = field(init=False)
    mixture: ResolvedMixture = field(init=False)
    is_steady: bool = field(init=False)
    own_evidence: deque[NDArray[np.float32]] = field(
        default_factory=lambda: deque(maxlen=MAX_EVIDENCE)
    )
    num_reread: int | None = None
    is_stateless: bool = False
    is_live: bool = True
    allowed: AllowedTokens | None = field(init=False)

    def __post_init__(self) -> None:
        request, bias = self.owner.request, self.owner.bias
        # Looked at for every token.
        self._max_tokens = request.sampling.max_tokens
        self._end_id = None if request.forced or request.sampling.ignore_eos else EOS_ID
        constraint = request.constraint
        self.allowed = AllowedTokens(constraint.fork(), bias.banned) if constraint else None
        self.mixture = self._whole = self.owner.request.mixture
        self._gate = gate_of(self._whole)
        moves = self._gate.moves_prior or self._gate.reads_answer
        self.is_steady = self.lazy is None and not moves
        # Answers that began together are not copied in one step.
        self.keep_at = KEEP_EVERY + self.slots[0] % KEEP_EVERY

    def take_up(self, answer: Sequence[int]) -> None:
        """Go on with an answer of so many tokens, all of them read but the last."""
        self.answer = list(answer)
        self.last_token = answer[-1]
        self.num_sampled = self.num_planned = len(answer)
        for token_id in answer:
            if self.occurrences is not None:
                self.occurrences.push(token_id)
        self.mixture = self._whole = self._at(len(answer))
        if self.lazy is not None:
            self.lazy.take_up(answer)

    def append(self, token_id: int) -> FinishReason | None:
        """Take in a token that was drawn; return why it ends the answer, None if it does not."""
        self.last_token = token_id
        self.num_sampled += 1
        self.answer.append(token_id)
        # A grammar may let none follow.
        if self.allowed is not None and self.allowed.advance(token_id):
            return "stop"
        if token_id == self._end_id:
            return "stop"
        if self.num_sampled != self._max_tokens:
            return None
        return "stop" if self.owner.request.forced else "length"

    def lose_states(self) -> None:
        """Note that all rows must read again what is committed, but for its last token.

        Nothing is under way for it, and it has a token.
        """
        start = self.owner.request.start
        at_start = 0 if start is None else start.num_read + max(0, len(start.answer) - 1)
        self.num_reread, self.is_stateless = at_start, True
        self.num_planned = self.num_sampled
        # A step that has left no token does not count.
        self.num_launched = self.num_sampled - (0 if start is None else len(start.answer))
        if self.lazy is not None:
            self.lazy.take_up(self.answer)

    @property
    def num_read(self) -> int | None:
        """Tokens of the answer that the rows have read in the steps launched; None before them."""
        if not self.num_launched:
            return None
        start = self.owner.request.start
        return self.num_launched - 1 + (len(start.answer) if start is not None else 0)

    @property
    def is_level(self) -> bool:
        """Whether every row has read as much as `num_read` says."""
        if self.lazy is None:
            return True
        num_planned = self.num_planned - 1
        return self.num_read == num_planned and self.lazy.is_level(num_planned)

    @property
    def wants_more(self) -> bool:
        """Whether another step may be planned: a length that will be reached ends the answer.

        Nor may one before the gate's choice of a row is known, where it makes one.
        """
        if self.num_planned == self._max_tokens or self.num_reread is not None:
            return False
        return self.num_sampled == self.num_planned or not self.is_probed

    @property
    def position(self) -> int:
        """Where in the answer the token is that was planned last; -1 before any."""
        return self.num_planned - 1

    @property
    def active_slots(self) -> list[int]:
        """Those of the rows that are awake."""
        return self.slots if self.lazy is None else [self.slots[k] for k in self.lazy.awake]

    @property
    def is_heard(self) -> bool:
        """Whether the gate reads what is sampled: the tokens before must be committed."""
        return self._gate.reads_answer

    @property
    def is_probed(self) -> bool:
        """Whether the gate chooses a row by the token that was planned last."""
        return self.lazy is not None and self.lazy.is_probe(self.position)

    def look(self, position: int) -> None:
        """Set `mixture` to what picks the answer's token at `position`."""
        if position == 0 or self._gate.moves_prior:
            self._whole = self._at(position)
        if self.lazy is None:
            self.mixture = self._whole
        else:
            self.mixture = self.lazy.choose(self._whole, position)

    @property
    def evidence(self) -> NDArray[np.float32]:
        """Log-probabilities [T, K] of what the gate has read so far, the last ones."""
        pieces = [*self.owner.evidence, *(row[None] for row in self.own_evidence)]
        if not pieces:
            return np.zeros((0, self.owner.request.mixture.rows), np.float32)
        return np.concatenate(pieces)[-MAX_EVIDENCE:]

    def _at(self, position: int) -> ResolvedMixture:
        """Return the request's mixture with the weights of a moment."""
        request = self.owner.request
        heard = Heard(position, request.turn, self.evidence)
        weights = named_weights(request.mixture, heard)
        if weights == self._whole.weights:
            return self._whole
        return replace(self._whole, weights=weights)


@dataclass(eq=False)
class Running:
    """A request that holds slots.

    Attributes:
        choices: the answers that have not finished.
        num_read: prompt tokens that the first answer's rows have read, or will have after the
            steps under way; the other answers' rows are copied from them when it reaches the
            prompt's length.
        num_cached: prompt tokens that `rows` have read.
        rows: what its rows begin with until they do; None is their states.
        parting: where the prompt parts from others, so that a chunk ends there; 0 is nowhere.
        evidence: log-probabilities [T, K] that each row gave to tokens of the user's, one array
            for each chunk that was scored.
        notes: what else was wanted of the prompt.
    """

    request: EngineRequest
    bias: Bias
    choices: list[Choice] = field(default_factory=list)
    num_read: int = 0
    num_cached: int = 0
    rows: Sequence[StateSnapshot] | None = None
    parting: int = 0
    evidence: list[NDArray[np.float32]] = field(default_factory=list)
    notes: PromptNotes = field(default_factory=PromptNotes)

    @property
    def num_unread(self) -> int:
        """Prompt tokens up to where a chunk must end."""
        stop = self.parting if self.num_read < self.parting else len(self.request.prompt)
        return next_stop(self.request.reinjections, self.num_read, stop) - self.num_read

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.num_read < len(self.request.prompt)


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt, `prompt[start : start + length]`, for the rows of `running`."""

    running: Running
    start: int
    length: int

    @property
    def is_first(self) -> bool:
        """Whether the rows must take their initial states before it."""
        return self.start == self.running.num_cached

    @property
    def is_reinjected(self) -> bool:
        """Whether the rows are given their tuned states anew before it."""
        return self.start in self.running.request.reinjections

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.start + self.length == len(self.running.request.prompt)

    @property
    def gives_token(self) -> bool:
        """Whether the first token of an answer is sampled after it."""
        return self.is_last and self.running.request.sampling.max_tokens != 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is read."""
        return self.running.request.prompt[self.start : self.start + self.length]

    def before_evidence(self) -> list[int]:
        """Return the positions of this chunk whose next token is evidence, here or beyond it."""
        stop = self.start + self.length
        return [
            position - 1
            for span in self.running.request.evidence
            for position in range(max(span.start, self.start + 1), min(span.stop, stop + 1))
        ]


@dataclass(frozen=True)
class CatchUp:
    """A piece of an answer, its tokens from `start` to `stop`, for a row that has missed them."""

    choice: Choice
    row: int
    start: int
    stop: int

    @property
    def slot(self) -> int:
        """Where the row's state is."""
        return self.choice.slots[self.row]

    @property
    def tokens(self) -> list[int]:
        """What is read; they must be committed. Fewer if the answer has ended meanwhile."""
        assert self.choice.lazy is not None
        return self.choice.lazy.tokens[self.start : self.stop]


@dataclass(frozen=True)
class Reread:
    """A piece of a prompt and its answer, for all rows of an answer that lost their states.

    Attributes:
        start: where in prompt and answer it begins.
        tokens: what they read again.
        is_first: whether the rows must take their initial states before it.
    """

    choice: Choice
    start: int
    tokens: Sequence[int]
    is_first: bool

    @property
    def is_reinjected(self) -> bool:
        """Whether the rows are given their tuned states anew before it."""
        return bool(self.tokens) and self.start in self.choice.owner.request.reinjections


@dataclass(frozen=True)
class Batch:
    """What one step does: a token for each answer of `decoding`, and prompt `chunks`.

    Attributes:
        sampling: the answers that get a token: those that decode, then those whose prompt ends.
        catching_up: what rows that wake read before that.
        resumed: those of `decoding` whose rows take the states of before first.
        rereading: what rows read again whose states were lost.
    """

    decoding: list[Choice]
    chunks: list[Chunk]
    sampling: list[Choice]
    catching_up: Sequence[CatchUp] = ()
    resumed: Sequence[Choice] = ()
    rereading: Sequence[Reread] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.decoding or self.chunks or self.catching_up or self.rereading)

    def look(self) -> None:
        """Take in what the step's prompts said, and what was sampled since it was planned.

        A runner calls it between reading and picking; what the answers needed of the moment before
        was known when the step was planned.
        """
        for choice in self.sampling:
            if choice.position == 0 or (not choice.is_steady and choice.is_heard):
                choice.look(choice.position)
