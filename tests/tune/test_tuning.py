"""State tuning on the tiny seeded model: what is learnt, and what stays."""

import random

import pytest
import torch
from tiny_model import TINY, checkpoint

from mrss_provider.errors import InvalidRequestError
from mrss_provider.tune import Example, TuneConfig, TuneJob, tune_state, tune_states
from mrss_provider.tune.network import Shape, forward, logits, start_state

PROMPT, FACT, REST = (3, 4, 5), (9,), (11, 12)
EXAMPLE = Example(
    (*PROMPT, *FACT, *REST),
    (False, False, False, True, True, True),
    (False, False, False, True, False, False),
)


@pytest.fixture(scope="module")
def weights():
    return checkpoint()


def always(example):
    return lambda rng: example


def log_probs(weights, state, example=EXAMPLE):
    """Return log-probabilities [T - 1, V] of the next token at every position."""
    shape = Shape.of(weights)
    wkv = torch.zeros(
        1, shape.num_layers, shape.num_heads, shape.head_size, shape.head_size
    ) if state is None else state[None]  # fmt: skip
    ids = torch.tensor([example.token_ids])
    hidden, _ = forward(weights, ids[:, :-1], start_state(shape, wkv, torch.float32))
    return logits(weights, hidden)[0].log_softmax(-1)


def nll(weights, state, positions):
    lp = log_probs(weights, state)
    return -sum(float(lp[p - 1, EXAMPLE.token_ids[p]]) for p in positions) / len(positions)


def config(**changes):
    defaults = {"steps": 30, "batch_size": 1, "learning_rate": 0.3, "warmup_steps": 2}
    return TuneConfig(**(defaults | changes))


def test_tuning_makes_the_answer_likely_and_leaves_the_weights_alone(weights):
    before = {name: tensor.clone() for name, tensor in weights.items()}
    result = tune_state(weights, always(EXAMPLE), config())
    assert result.losses[0] == pytest.approx(nll(weights, None, (3, 4, 5)), rel=1e-4)
    assert nll(weights, result.wkv, (3, 4, 5)) < 0.2 * result.losses[0]
    assert result.wkv.shape == (TINY.num_layers, TINY.num_heads, 64, 64)
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad


def test_loss_on_all_also_learns_the_question(weights):
    answer = tune_state(weights, always(EXAMPLE), config()).wkv
    everything = tune_state(weights, always(EXAMPLE), config(loss_on="all")).wkv
    assert nll(weights, everything, (1, 2)) < 0.5 * nll(weights, answer, (1, 2))


def test_locality_learns_the_fact_and_keeps_the_other_tokens_at_the_base(weights):
    def drift(state):
        """KL(base || tuned) on the answer's tokens after the fact."""
        base, own = log_probs(weights, None)[3:], log_probs(weights, state)[3:]
        return float((base.exp() * (base - own)).sum(-1).mean())

    plain = tune_state(weights, always(EXAMPLE), config()).wkv
    local = tune_state(weights, always(EXAMPLE), config(locality=5.0, steps=60)).wkv
    assert nll(weights, local, (3,)) < 0.2 * nll(weights, None, (3,))
    assert drift(local) < 0.2 * drift(plain)


def test_states_tuned_together_come_out_as_if_tuned_alone(weights):
    other = Example((7, 8, 20), (False, False, True), (False, False, False))
    jobs = [
        TuneJob(always(EXAMPLE), config(steps=5, locality=1.0)),
        TuneJob(always(other), config(steps=5, learning_rate=0.1, batch_size=2)),
    ]
    together = tune_states(weights, jobs)
    for job, result in zip(jobs, together, strict=True):
        alone = tune_state(weights, job.source, job.config)
        # A few rounded sums apart: the rows of a batch share one matrix product.
        assert torch.allclose(result.wkv, alone.wkv, atol=2e-3)
        assert result.losses == pytest.approx(alone.losses, rel=1e-3)


def test_each_job_is_cut_to_its_own_max_len(weights):
    long = Example(tuple(range(1, 41)), (True,) * 40, (False,) * 40)
    jobs = [TuneJob(always(long), config(steps=2, max_len=n)) for n in (10, 16, 512)]
    together = tune_states(weights, jobs)
    for job, result in zip(jobs, together, strict=True):
        alone = tune_state(weights, job.source, job.config)
        assert result.losses == pytest.approx(alone.losses, rel=1e-3)
        expected = -log_probs(weights, None, long)[: job.config.max_len].gather(
            1, torch.tensor(long.token_ids[1 : job.config.max_len + 1])[:, None]
        )
        assert result.losses[0] == pytest.approx(float(expected.mean()), rel=1e-3)


def test_the_same_seed_gives_the_same_state_and_another_seed_another(weights):
    def draw(rng):
        return Example((rng.randrange(50), 9), (False, True), (False, False))

    first, again = (tune_state(weights, draw, config(steps=3)).wkv for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, tune_state(weights, draw, config(steps=3, seed=1)).wkv)


def test_an_initial_state_is_where_tuning_starts(weights):
    first = tune_state(weights, always(EXAMPLE), config())
    further = tune_state(weights, always(EXAMPLE), config(steps=1), initial=first.wkv)
    assert further.losses[0] == pytest.approx(nll(weights, first.wkv, (3, 4, 5)), rel=1e-3)


def test_progress_is_told_after_every_step(weights):
    told = []
    tune_state(weights, always(EXAMPLE), config(steps=3), on_step=lambda *a: told.append(a))
    assert [(step, total) for step, total, _ in told] == [(1, 3), (2, 3), (3, 3)]


def test_the_rate_warms_up_and_falls_to_its_final_share():
    plan = TuneConfig(steps=100, learning_rate=2.0, warmup_steps=10, final_rate=0.1)
    assert plan.rate_at(0) == pytest.approx(0.2)
    assert plan.rate_at(9) == pytest.approx(2.0)
    assert plan.rate_at(100) == pytest.approx(0.2)
    rates = [plan.rate_at(step) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"locality": -1.0}, "locality must be 0 or more"),
        ({"loss_on": "facts"}, "loss_on must be 'answer' or 'all'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(changes, says):
    with pytest.raises(InvalidRequestError, match=says):
        config(**changes)


def test_examples_without_anything_to_learn_are_refused(weights):
    nothing = Example((3, 4), (False, False), (False, False))
    with pytest.raises(InvalidRequestError, match="no token to learn"):
        tune_state(weights, always(nothing), config())


@pytest.mark.parametrize(
    ("answer", "changes"),
    [
        ((False, False, False), {}),
        ((False, False, True), {"max_len": 1}),
        ((False, False, True), {"locality": 1.0}),
    ],
)
def test_a_job_without_anything_to_learn_is_refused_beside_one_with(weights, answer, changes):
    said = Example((3, 4, 5), answer, (False, False, False))
    jobs = [TuneJob(always(EXAMPLE), config()), TuneJob(always(said), config(**changes))]
    with pytest.raises(InvalidRequestError, match="no token to learn for job 2 of 2"):
        tune_states(weights, jobs)


def test_jobs_of_different_length_are_refused(weights):
    jobs = [TuneJob(always(EXAMPLE), config(steps=n)) for n in (1, 2)]
    with pytest.raises(InvalidRequestError, match="the same steps"):
        tune_states(weights, jobs)


def test_an_initial_state_of_another_shape_is_refused_with_both_shapes(weights):
    with pytest.raises(InvalidRequestError, match=r"\[1, 2\].*\[2, 2, 64, 64\]"):
        tune_state(weights, always(EXAMPLE), config(), initial=torch.zeros(1, 2))


@pytest.mark.slow
def test_the_generator_of_a_job_is_its_own(weights):
    drawn = []

    def draw(rng):
        drawn.append(rng.random())
        return EXAMPLE

    tune_state(weights, draw, config(steps=2, batch_size=2, seed=5))
    rng = random.Random(5)
    assert drawn == [rng.random() for _ in range(4)]
