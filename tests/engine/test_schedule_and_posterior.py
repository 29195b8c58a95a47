"""Weights that change as an answer goes on, and those that the prompt sets before it begins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_model import FakeModel, mixture, request
from fake_runs import BANNED, A, B, make_engine, run

from mrss_provider.engine.gates import Heard, named_weights
from mrss_provider.engine.philox import uniform
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.engine.sampler import sample
from mrss_provider.engine.tail import merge_rows


def scheduled(mixed: ResolvedMixture, position: int) -> ResolvedMixture:
    return replace(mixed, weights=named_weights(mixed, Heard(position=position)))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_schedule_speaks_with_the_weights_of_each_position(on_device: bool) -> None:
    mixed = mixture(A, B, weights=[0.5, 0.5], gate="schedule:amber=1@0,0@12+blue=0.2@0,1@12")
    wanted = request("x", [4, 2], mixed, max_tokens=20, seed=6, logprobs=True)
    outputs = run(make_engine(FakeModel(), on_device=on_device, lazy=False), {0: [wanted]})
    model, answer = FakeModel(), [o.token_id or 0 for o in outputs["x", 0]]
    for position, output in enumerate(outputs["x", 0]):
        read = [*wanted.prompt, *answer[:position]]
        rows = torch.stack([model.logits_after(read, state) for state in (A, B)])
        rows[:, BANNED] = -torch.inf
        merged = merge_rows(rows, [(range(2), scheduled(mixed, position))]).log_softmax(-1)
        assert output.logprob == pytest.approx(float(merged[0, answer[position]]), abs=1e-4)


def test_a_schedule_uploads_weights_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = mixture(A, B, weights=[0.5, 0.5], gate="schedule:amber=1@0,0.1@12")
    engine = make_engine(FakeModel(), on_device=True)
    engine.add(request("x", [4, 2], mixed, max_tokens=40))
    engine.step()
    layout = engine._runner._layout  # type: ignore[attr-defined]
    seen = []
    monkeypatch.setattr(layout, "_upload", lambda: seen.append("all"))
    for _ in range(20):
        engine.step()
        seen.append(tuple(layout.inputs.named[:2].tolist()))
    assert "all" not in seen
    assert len(set(seen[:11])) == 11
    assert len(set(seen[12:])) == 1


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("gate", ["posterior", "posterior:0", "posterior:0.02,true"])
def test_the_posterior_believes_the_state_that_would_have_written_the_prompt(
    gate: str, on_device: bool
) -> None:
    """A prompt sampled from one state; the answer's weights are the gate's of the evidence."""
    model = FakeModel()
    sampling = request("x", [1], mixture(A)).sampling
    for writer, state in enumerate((A, B)):
        text = [1]
        for position in range(40):
            logits = model.logits_after(text, state)
            logits[BANNED] = -torch.inf
            text += sample(logits[None], [sampling], [uniform(5, 0, position)])
        mixed = mixture(A, B, weights=[0.5, 0.5], gate=gate)
        wanted = replace(request("x", text, mixed, 2, max_tokens=6), evidence=(range(1, 41),))
        engine = make_engine(FakeModel(), on_device=on_device)
        engine.add(wanted)
        choices = list(engine._scheduler._running["x"].choices)
        while engine.has_work:
            engine.step()
        heard = torch.stack([model.logits_after(text[:t], s) for t in range(1, 41) for s in (A, B)])
        heard[:, BANNED] = -torch.inf
        scores = heard.log_softmax(-1).view(40, 2, -1)[range(40), :, text[1:]]
        weights = named_weights(mixed, Heard(6, 1, scores.numpy()))
        assert weights[writer] > (0.95 if gate == "posterior:0" else 0.55)
        for choice in choices:
            if "true" not in gate:
                kept = [weights[k] for k in choice.lazy.awake]
                total = sum(kept)
                assert choice.mixture.weights == pytest.approx([w / total for w in kept], abs=1e-3)
            else:
                assert len(choice.own_evidence) == 5
                assert choice.mixture.weights != pytest.approx(weights, abs=1e-4)
