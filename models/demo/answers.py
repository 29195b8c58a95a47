"""Answers of mixtures of tuned states, many at once, and what the rows say of given texts.

The merge rules and gates are the engine's own; only the sampling loop is written for throughput.
A prompt is read once by each state, whatever mixtures the state is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.demo.data import as_example
from models.demo.vocab import PieceEncoder
from mrss_provider.engine.gates import Heard, gate_of, named_weights
from mrss_provider.engine.merges import Rows, make_merge
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.evaluate.world import Document
from mrss_provider.tune.examples import Example, make_batch
from mrss_provider.tune.network import RowState, Shape, Weights, forward, logits, start_state

MAX_NEW = 56

USER, ASSISTANT = "User:", "\n\nAssistant:"

LogProbs = NDArray[np.float32]


@dataclass(frozen=True)
class System:
    """A way to answer.

    Attributes:
        rows: names of the K states that read, in row order.
        name_weights: what the rows said of a user's text, [T, K] -> the named weights [K].
        merge: logits of the rows [G, K, V], and their named weights [G, K] -> logits [G, V].
    """

    rows: tuple[str, ...]
    name_weights: Callable[[LogProbs], Sequence[float]]
    merge: Callable[[Tensor, Tensor], Tensor]


def single(name: str) -> System:
    """Return one state, as it is."""
    return System((name,), lambda said: (1.0,), lambda rows, named: rows[:, 0])


def mixed(mixture: ResolvedMixture) -> System:
    """Return a mixture of the engine's."""
    rule, gate = make_merge(mixture.merge), gate_of(mixture)

    def merge(row_logits: Tensor, named: Tensor) -> Tensor:
        cut = row_logits.new_full(row_logits.shape[:1], mixture.cut)
        rows = Rows(row_logits, named, cut, base_named=mixture.base_named)
        return rule.merge(rows, gate.weights(rows, sums_to_one=rule.sums_to_one))

    def name_weights(said: LogProbs) -> Sequence[float]:
        return named_weights(mixture, Heard(log_probs=said))

    return System(mixture.names, name_weights, merge)


@dataclass(frozen=True)
class Decoding:
    """How to draw a token. Temperature 0 is greedy."""

    name: str
    temperature: float
    top_p: float


DECODINGS = (
    Decoding("T=1", 1.0, 1.0),
    Decoding("top-p 0.7", 1.0, 0.7),
    Decoding("greedy", 0.0, 1.0),
)


@dataclass(frozen=True)
class _Read:
    """What one state made of G prompts: its state after them, logits [G, V], and the user's text.

    `said` are the log-probabilities of the tokens of each prompt's last user.
    """

    state: RowState
    logits: Tensor
    said: list[LogProbs]


@dataclass(frozen=True)
class _Scored:
    """What one state says of documents: logits [M, V] of the answers' tokens, the users' text."""

    logits: Tensor
    said: list[LogProbs]


class Bench:
    """The model and its states by name, [L, H, N, N] each; `base` is there from the start."""

    def __init__(
        self, weights: Weights, encoder: PieceEncoder, states: Mapping[str, Tensor]
    ) -> None:
        self.weights = weights
        self.encoder = encoder
        self.device = weights["emb.weight"].device
        self._shape = Shape.of(weights)
        zeros = torch.zeros(self._shape.state_size)
        self._states = {"base": zeros, **states}
        self._read: dict[tuple[str, tuple[str, ...]], _Read] = {}
        self._scored: dict[tuple[str, tuple[str, ...]], _Scored] = {}

    def add(self, name: str, wkv: Tensor) -> None:
        """Add a state [L, H, N, N]."""
        self._states[name] = wkv

    def forget(self) -> None:
        """Let go of what was read: 0.4 MB a prompt and state."""
        self._read.clear()
        self._scored.clear()

    @torch.no_grad()
    def answer(
        self, system: System, prompts: Sequence[str], decoding: Decoding, seed: int
    ) -> list[str]:
        """Answer every prompt until the end of the turn or `MAX_NEW` tokens.

        A prompt's random numbers depend on the seed and its place, not on the system.
        """
        read = [self._reads(name, tuple(prompts)) for name in system.rows]
        named = self._named(system, [one.said for one in read])
        state = _interleave([one.state for one in read])
        z = torch.stack([one.logits for one in read], 1)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(len(prompts), MAX_NEW, generator=generator).to(self.device)
        ends = torch.tensor([self.encoder.encode("\n\n")[0], 0], device=self.device)
        running = torch.arange(len(prompts), device=self.device)
        answers: list[list[int]] = [[] for _ in prompts]
        for at in range(MAX_NEW):
            drawn = _draw(system.merge(z, named[running]), decoding, draws[running, at])
            going = ~torch.isin(drawn, ends)
            running, drawn = running[going], drawn[going]
            for place, token in zip(running.tolist(), drawn.tolist(), strict=True):
                answers[place].append(token)
            if len(running) == 0:
                break
            rows = going.repeat_interleave(len(system.rows))
            tokens = drawn.repeat_interleave(len(system.rows))[:, None]
            hidden, state = forward(self.weights, tokens, _select(state, rows))
            z = logits(self.weights, hidden[:, 0]).view(len(running), len(system.rows), -1)
        return [self.encoder.decode(ids).split("\n\n")[0].strip() for ids in answers]

    @torch.no_grad()
    def named_weights(self, system: System, prompts: Sequence[str]) -> Tensor:
        """Return the named weights [G, K] that a system's gate begins the answers with."""
        return self._named(system, [self._reads(name, tuple(prompts)).said for name in system.rows])

    @torch.no_grad()
    def nll(self, system: System, docs: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor]:
        """Score the answers of documents.

        Returns:
            nats [M] fp64 of every token that an answer has, which document it is of, and whether
            it states a fact.
        """
        scored = [self._scores(name, docs) for name in system.rows]
        named = self._named(system, [one.said for one in scored])
        examples = [as_example(self.encoder, doc) for doc in docs]
        doc_of, following, is_fact = [], [], []
        for i, example in enumerate(examples):
            for at in _answered(example):
                doc_of.append(i)
                following.append(example.token_ids[at])
                is_fact.append(example.fact[at])
        document = torch.tensor(doc_of)
        z = torch.stack([one.logits for one in scored], 1)
        merged = system.merge(z, named[document.to(self.device)]).log_softmax(-1)
        targets = torch.tensor(following, device=self.device)[:, None]
        nats = -merged.gather(-1, targets)[:, 0].clamp_min(-30.0)
        return nats.double().cpu(), document, torch.tensor(is_fact)

    def _named(self, system: System, said: Sequence[list[LogProbs]]) -> Tensor:
        """Return the named weights [G, K] after what each row said of each user's text."""
        texts = zip(*said, strict=True)
        named = [system.name_weights(np.stack(rows, axis=1)) for rows in texts]
        return torch.tensor(named, dtype=torch.float32, device=self.device)

    def _start(self, name: str, count: int) -> RowState:
        wkv = self._states[name].to(self.device).expand(count, -1, -1, -1, -1)
        return start_state(self._shape, wkv, self.weights["emb.weight"].dtype)

    def _reads(self, name: str, prompts: tuple[str, ...]) -> _Read:
        """Read the prompts with a state; those of one length together."""
        known = self._read.get((name, prompts))
        if known is not None:
            return known
        ids = [self.encoder.encode(prompt) for prompt in prompts]
        by_length: dict[int, list[int]] = {}
        for place, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(place)
        parts: list[RowState] = []
        order: list[int] = []
        last = torch.empty(len(ids), self._shape.vocab_size, device=self.device)
        said: list[LogProbs] = [np.zeros(0, np.float32)] * len(ids)
        for places in by_length.values():
            tokens = torch.tensor([ids[place] for place in places], device=self.device)
            hidden, state = forward(self.weights, tokens, self._start(name, len(places)))
            last[places] = logits(self.weights, hidden[:, -1])
            for row, place in enumerate(places):
                start, end = self._user_span(prompts[place])
                said[place] = self._log_probs(hidden[row], tokens[row], start, end)
            parts.append(state)
            order += places
        back = torch.tensor(order, device=self.device).argsort()
        read = _Read(_select(_concatenate(parts), back), last, said)
        self._read[name, prompts] = read
        return read

    def _scores(self, name: str, docs: Sequence[Document]) -> _Scored:
        """Read whole documents of one turn with a state."""
        key = name, tuple(doc.text for doc in docs)
        known = self._scored.get(key)
        if known is not None:
            return known
        examples = [as_example(self.encoder, doc) for doc in docs]
        batch = make_batch(examples, 512, self.device)
        hidden, _ = forward(self.weights, batch.inputs, self._start(name, len(docs)))
        said = []
        for i, doc in enumerate(docs):
            start, end = self._user_span(doc.text[: doc.answers[0][0]])
            said.append(self._log_probs(hidden[i], batch.inputs[i], start, end))
        scored = _Scored(logits(self.weights, hidden[batch.answer]), said)
        self._scored[key] = scored
        return scored

    def _user_span(self, prompt: str) -> tuple[int, int]:
        """Return where the last user's text is among the tokens of a prompt that ends with it."""
        before = prompt.rindex(USER) + len(USER)
        ids = self.encoder.encode
        return len(ids(prompt[:before])), len(ids(prompt.removesuffix(ASSISTANT)))

    def _log_probs(self, hidden: Tensor, tokens: Tensor, start: int, end: int) -> LogProbs:
        """Return the log-probabilities of `tokens[start:end]`, of a text that `hidden` reads."""
        z = logits(self.weights, hidden[start - 1 : end - 1]).log_softmax(-1)
        chosen: LogProbs = z.gather(-1, tokens[start:end, None])[:, 0].cpu().numpy()
        return chosen


def _answered(example: Example) -> list[int]:
    return [at for at, flag in enumerate(example.answer) if flag and at > 0]


def _draw(z: Tensor, decoding: Decoding, uniforms: Tensor) -> Tensor:
    """Return a token for each row of `z` [G, V], from one number in [0, 1) each."""
    if decoding.temperature == 0:
        return z.argmax(-1)
    probs = (z / decoding.temperature).double().softmax(-1)
    if decoding.top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= decoding.top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    reached = probs.cumsum(-1)
    return (reached > uniforms[:, None] * reached[:, -1:]).int().argmax(-1)


def _select(state: RowState, rows: Tensor) -> RowState:
    return RowState(*([part[rows] for part in parts] for parts in _parts(state)))


def _concatenate(states: Sequence[RowState]) -> RowState:
    layers = zip(*(_parts(state) for state in states), strict=True)
    return RowState(*([torch.cat(one) for one in zip(*parts, strict=True)] for parts in layers))


def _interleave(states: Sequence[RowState]) -> RowState:
    """Return the states of G * K rows, those of one prompt together, from K states of G rows."""
    kinds = zip(*(_parts(state) for state in states), strict=True)
    return RowState(
        *(
            [torch.stack(one, 1).flatten(0, 1) for one in zip(*parts, strict=True)]
            for parts in kinds
        )
    )


def _parts(state: RowState) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return state.wkv, state.shift_att, state.shift_ffn
