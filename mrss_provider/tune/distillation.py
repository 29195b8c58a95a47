"""Answers of a mixture to learn from, and how far a state stays from the mixture it imitates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mrss_provider.backend import Backend, GenerateRequest, Message
from mrss_provider.chat import ChatTemplate
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.tokenizer import Tokenizer
from mrss_provider.tune.chats import Line, chat_example
from mrss_provider.tune.config import TuneResult
from mrss_provider.tune.examples import Batch, Example, make_batch
from mrss_provider.tune.gate_report import Interval, bootstrap
from mrss_provider.tune.network import Weights, base_state, logits, read_rows
from mrss_provider.tune.token_loss import Imitation, divergence

MAX_ANSWERS_AT_ONCE = 8

_EXAMPLES_A_PASS = 8


@dataclass(frozen=True)
class Sampling:
    """How the answers to learn from are drawn: at temperature 1, from the whole distribution.

    Attributes:
        samples: answers a prompt.
        max_tokens: of an answer; longer ones are left out.
        seed: of the draws.
    """

    samples: int = 2
    max_tokens: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Gap:
    """How far a state is from its mixture on the mixture's own answers.

    Attributes:
        kl: nats a token, `KL(mixture || state)`.
        base: the same of the base, which shows how much there was to learn.
        agreement: share of tokens of which both have the same likeliest one.
        prompts: that it was measured on.
        tokens: of their answers.
    """

    kl: Interval
    base: float
    agreement: float
    prompts: int
    tokens: int


async def sample_answers(
    backend: Backend,
    mixture: str,
    prompts: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    on_answer: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """Return the mixture's answers to each prompt; those that did not end are left out.

    Raises:
        MRSSError: as the backend does.
    """
    slots = asyncio.Semaphore(MAX_ANSWERS_AT_ONCE)
    done = 0

    async def answers(number: int) -> list[str]:
        nonlocal done
        request = GenerateRequest(
            model=mixture,
            sampling=SamplingParams(
                temperature=1.0,
                top_p=1.0,
                seed=sampling.seed * 1_000_003 + number,
                max_tokens=sampling.max_tokens,
            ),
            messages=tuple(prompts[number]),
            n=sampling.samples,
        )
        texts = [""] * sampling.samples
        ended: set[int] = set()
        async with slots:
            async for delta in await backend.open(request):
                texts[delta.index] += delta.text
                if delta.finish_reason == "stop":
                    ended.add(delta.index)
        done += 1
        if on_answer is not None:
            on_answer(done, len(prompts))
        return [text.strip() for i, text in enumerate(texts) if i in ended and text.strip()]

    return list(await asyncio.gather(*(answers(number) for number in range(len(prompts)))))


def answered_lines(
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> list[Line]:
    """Return a line for every answer, with its prompt's number from 1."""
    lines = []
    for number, (prompt, texts) in enumerate(zip(prompts, answers, strict=True), start=1):
        for text in texts:
            said = (*prompt, Message("assistant", text))
            example = chat_example(said, (), tokenizer, template)
            lines.append(Line(number, said, None, _last_answer_only(example)))
    return lines


def _last_answer_only(example: Example) -> Example:
    """Return it with the last run of answer flags alone: the mixture said no other answer."""
    flags = list(example.answer)
    end = len(flags)
    while end and not flags[end - 1]:
        end -= 1
    start = end
    while start and flags[start - 1]:
        start -= 1
    answer = tuple(start <= at < end for at in range(len(flags)))
    return replace(example, answer=answer)


def measure_gap(
    weights: Weights,
    imitation: Imitation,
    result: TuneResult,
    lines: Sequence[Line],
    *,
    max_len: int,
    seed: int,
) -> Gap:
    """Compare a state with the mixture token by token on answers of the mixture.

    Args:
        weights: of the model.
        imitation: of the mixture.
        result: the state.
        lines: the answers, from `answered_lines`; at least one.
        max_len: tokens of an example that are looked at.
        seed: of the interval's resampling, which is over prompts.
    """
    device = weights["emb.weight"].device
    base = base_state(weights)
    kls: list[Tensor] = []
    bases: list[Tensor] = []
    same: list[Tensor] = []
    document: list[int] = []
    for start in range(0, len(lines), _EXAMPLES_A_PASS):
        part = lines[start : start + _EXAMPLES_A_PASS]
        batch = make_batch([line.example for line in part], max_len, device)
        merged = imitation.merged(batch, batch.answer)
        own = _logits(weights, batch, result.wkv, result.time_offset)
        untuned = _logits(weights, batch, base, None)
        kls.append(divergence(merged, own))
        bases.append(divergence(merged, untuned))
        same.append(merged.argmax(-1) == own.argmax(-1))
        counts = batch.answer.sum(1).tolist()
        document += [
            line.number for line, count in zip(part, counts, strict=True) for _ in range(count)
        ]
    kl = torch.cat(kls).double().cpu()
    documents = torch.tensor(document)
    return Gap(
        kl=bootstrap(kl, documents, seed=seed),
        base=float(torch.cat(bases).mean()),
        agreement=float(torch.cat(same).float().mean()),
        prompts=len(set(document)),
        tokens=len(kl),
    )


@torch.no_grad()
def _logits(weights: Weights, batch: Batch, wkv: Tensor, offset: Tensor | None) -> Tensor:
    """Return logits [M, V] of a batch's answers, read from a state."""
    count, device = len(batch.lengths), batch.inputs.device
    rows = wkv.to(device).expand(count, *wkv.shape)
    offsets = None if offset is None else offset.to(device).expand(count, *offset.shape)
    hidden = read_rows(weights, batch.inputs, batch.lengths, rows, offsets=offsets)
    return logits(weights, hidden[batch.answer])
