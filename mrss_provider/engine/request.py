"""What goes into the engine and what comes out: token ids, never text.

`ResolvedMixture` is a name made concrete by `StateLibrary.resolve`; `EngineRequest` asks for `n`
answers to one prompt; each sampled token comes back as a `TokenOutput`.
"""

from __future__ import annotations

import functools
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mrss_provider.backend import FinishReason, Reinject
from mrss_provider.engine.reinjection import marks
from mrss_provider.engine.token_ids import to_array
from mrss_provider.errors import MRSSError
from mrss_provider.mixture import Method
from mrss_provider.sampling_params import DEFAULT_MAX_TOKENS, SamplingOrder, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mrss_provider.engine.constraint import Constraint
    from mrss_provider.engine.continuation import Capture, StartPoint
    from mrss_provider.engine.gates import Learned
    from mrss_provider.engine.trace import RowsTrace
    from mrss_provider.model import TunedState

EOS_ID = 0
"""End of text in every RWKV vocabulary; also what begins a text (`bos`)."""

MAX_EVIDENCE = 256
"""Tokens of the user's that a gate looks at, the last ones: what a prompt of any length costs."""

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 0.7
DEFAULT_SAMPLING_ORDER: SamplingOrder = "openai"


@dataclass(frozen=True)
class ResolvedMixture:
    """A mixture whose states are loaded: one recurrent state (row) for each entry of `states`.

    Attributes:
        canonical: the one spelling of this mixture, without the model's name.
        states: in row order; None is the base. The base, if present, is row 0.
        names: of the rows' states; "base" for the base.
        groups: of the rows' states, as their files say; "" where none is said.
        ratios: one a row, the largest 1 in absolute value, as the canonical name has them; 0.0
            for a base row that only the rule or the gate needs.
        weights: the same as the merge rule wants them (sum 1, or strengths).
        merge: merge rule ("linear" for a single row, which comes back unchanged).
        gate: gate ("fixed" for a single row).
        cut: plausibility cut in [0, 1); 0 is off.
        base_row: 0, or None if no row is the base.
        reinject: whether the rows are given their tuned states anew at turns of the user's; there
            is a base row then.
        without_reinject: the same mixture with `reinject` "never", for what has no turns; None
            where the request itself asks for "turn".
        temperature: the named mixture's default, or None.
        top_p: the named mixture's default, or None.
        sampling_order: the named mixture's default, or None.
        fingerprint: of the model's weights (as quantised), the states' bytes, weights, merge, gate
            and cut.
        trained_gate: what a gate that needs training was loaded as; None for the others.
        template: the chat template that the named mixture or its states ask for, by name; None is
            the model's.
    """

    canonical: str
    states: tuple[TunedState | None, ...] = field(repr=False, compare=False)
    names: tuple[str, ...]
    groups: tuple[str, ...]
    ratios: tuple[float, ...]
    weights: tuple[float, ...]
    merge: Method
    gate: Method
    cut: float
    base_row: int | None
    fingerprint: str
    reinject: Reinject = "never"
    without_reinject: ResolvedMixture | None = field(default=None, repr=False, compare=False)
    temperature: float | None = None
    top_p: float | None = None
    sampling_order: SamplingOrder | None = None
    trained_gate: Learned | None = field(default=None, repr=False, compare=False)
    template: str | None = None

    @property
    def rows(self) -> int:
        """Recurrent states that one answer needs."""
        return len(self.states)

    @property
    def base_named(self) -> bool:
        """Whether row 0 is the base because the name contains it."""
        return self.base_row is not None and self.ratios[0] > 0


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a prompt, behind the last norm, become one vector of length 1.

    Attributes:
        is_mean: the mean over the prompt's tokens; else the last token's.
        num_dimensions: leading components that are kept; 0 is all.
    """

    is_mean: bool = True
    num_dimensions: int = 0


@dataclass(frozen=True)
class EngineRequest:
    """One prompt, `n` answers.

    Attributes:
        id: unique among the requests that have not finished.
        prompt: token ids. An empty prompt becomes the single token 0 (what a text begins with),
            so `len(request.prompt)` is always what usage counts.
        sampling: with every default filled in (`resolve_sampling`). Where `max_tokens` is 0 the
            prompt is read, and that is all.
        n: answers, each with its own random stream.
        evidence: positions of the prompt's tokens that every row is to score, in order, for a gate
            that reads them; the first token is never scored, as nothing comes before it.
        turn: of the user's in the conversation, 1 or more.
        trace: tell of each token which row spoke.
        forced: the tokens of the answer, where it is given: as many as `sampling.max_tokens`.
        owner: who asks; owners that want more than there is get equal shares.
        start: where the rows begin if not at their states and not where the cache says.
        pauses: tokens at which an answer may end, so that the state there is worth keeping.
        capture: gets the rows' states at the end of the prompt and of the answer.
        score_prompt: tell how likely each token of the prompt was, and so many of the likeliest in
            its place; None does not.
        reinjections: positions of the prompt, ascending, where rows are given their tuned states
            anew before the token there is read; none is 0. Only with a mixture that has a base row.
        pooling: what to make of the prompt's hidden states; it has one row then, and no answer.
        constraint: what each answer conforms to, at its beginning; the answers get forks of it.
    """

    id: str
    prompt: tuple[int, ...]
    mixture: ResolvedMixture
    sampling: SamplingParams
    n: int = 1
    evidence: tuple[range, ...] = ()
    turn: int = 1
    trace: bool = False
    forced: tuple[int, ...] = ()
    owner: str = ""
    start: StartPoint | None = None
    pauses: frozenset[int] = frozenset()
    capture: Capture | None = None
    score_prompt: int | None = None
    reinjections: tuple[int, ...] = ()
    pooling: Pooling | None = None
    constraint: Constraint | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt) or (EOS_ID,))

    @property
    def is_read_whole(self) -> bool:
        """Whether something is wanted of every token of the prompt, so that none may be skipped."""
        return self.score_prompt is not None or self.pooling is not None

    @functools.cached_property
    def prompt_ids(self) -> NDArray[np.int32]:
        """The prompt as an array [T], read-only: whoever looks at all of it looks at this.

        Made once: of a long prompt that takes as long as a good part of a GPU's step.

        Raises:
            OverflowError: an id that int32 does not hold.
            TypeError: something that is no integer.
        """
        return to_array(self.prompt)

    @functools.cached_property
    def prompt_bounds(self) -> tuple[int, int]:
        """The smallest and the largest id of the prompt; raises as `prompt_ids`."""
        return int(self.prompt_ids.min()), int(self.prompt_ids.max())

    @functools.cached_property
    def reinjection_marks(self) -> tuple[str, ...]:
        """Names of the first 0, 1, 2, ... of `reinjections`; see `reinjection.marks`."""
        return marks(self.reinjections)

    @property
    def rows(self) -> int:
        """Slots that the request holds while it runs: the mixture's rows for each answer."""
        return self.mixture.rows * self.n


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of the prompt under the merge: as `TokenOutput` has a sampled one.

    Attributes:
        logprob: natural; -inf where it cannot occur.
        top: the likeliest (id, logprob) in its place, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptReading:
    """What reading a prompt has told.

    Attributes:
        scores: of all its tokens but the first, if they were wanted.
        vector: float32 [D] of length 1, if it was.
    """

    scores: tuple[TokenScore, ...] = ()
    vector: NDArray[np.float32] | None = None


# Not frozen, which would make each of them cost four times as much: there is one a token.
@dataclass(slots=True)
class TokenOutput:
    """One sampled token of one answer, or the error that ended it.

    Attributes:
        index: which of the `n` answers.
        token_id: None with `error`, and where the request has no answer. The end-of-text token that
            ends an answer is reported.
        logprob: natural log-probability under the merge, before penalties, if asked for.
        top: the likeliest (id, logprob), best first; tokens that cannot occur are left out.
        finish_reason: set on an answer's last token: "stop" (end of text, or of a given answer) or
            "length".
        error: what ended the answer; no more outputs of it follow.
        trace: what the rows had to do with it, if asked for.
        num_cached: tokens of the prompt that no row had to read.
        reading: of the prompt, if something was wanted of it; with an answer's first output.
    """

    request_id: str
    index: int
    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: MRSSError | None = None
    trace: RowsTrace | None = None
    num_cached: int = 0
    reading: PromptReading | None = None


def resolve_sampling(
    sampling: SamplingParams,
    mixture: ResolvedMixture,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    sampling_order: SamplingOrder | None = None,
    room: int | None = None,
) -> SamplingParams:
    """Fill in what the request left unsaid: the mixture's default, then the model's, then ours.

    Args:
        sampling: as the request gave it.
        mixture: whose named defaults come first.
        temperature: the model's default.
        top_p: the model's default.
        sampling_order: the model's default.
        room: tokens left in the context after the prompt; caps the default of `max_tokens`
            (a value that the request gives is never changed).
    """
    default_len = DEFAULT_MAX_TOKENS if room is None else max(1, min(DEFAULT_MAX_TOKENS, room))
    asked = sampling.sampling_order or mixture.sampling_order
    return replace(
        sampling,
        temperature=_first(
            sampling.temperature, mixture.temperature, temperature, DEFAULT_TEMPERATURE
        ),
        top_p=_first(sampling.top_p, mixture.top_p, top_p, DEFAULT_TOP_P),
        sampling_order=asked or sampling_order or DEFAULT_SAMPLING_ORDER,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        max_tokens=default_len if sampling.max_tokens is None else sampling.max_tokens,
    )


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
