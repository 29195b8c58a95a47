"""Constrained answers in the engine: what a mask does to a mixture, and what it costs others."""

import numpy as np
import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_state, mixture, request
from test_device_runner import CONFIG, device_engine, host_engine
from test_engine import ids, make_engine, run

from mrss_provider.engine.constraint import AllowedTokens, MaskWorkers, constrain, mask_of
from mrss_provider.engine.merges import MERGE_RULES
from mrss_provider.errors import InvalidRequestError

A, B, C = (fake_state(name) for name in ("amber", "blue", "cyan"))
MIXTURES = [
    mixture(A),
    *(
        mixture(None, A, B, weights=[0.2, 0.5, 0.3], merge=name, gate=gate, cut=0.1)
        for name in MERGE_RULES
        for gate in ("fixed", "novelty")
    ),
]
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.8},
    {"temperature": 1.0, "top_p": 0.3, "min_p": 0.2, "frequency_penalty": 2.0},
    {"temperature": 1.3, "logit_bias": {7: 90.0, 11: -100.0}, "sampling_order": "rwkv"},
]


def met(constraint, words):
    try:
        constraint.fill_mask(words)
    except InvalidRequestError as exc:
        return exc
    return None


class Cycle:
    """A constraint: token `i` of an answer is one of `sets[i]`; behind them it may only end."""

    num_words = -(-VOCAB // 32)
    param = "response_format"
    end_ids = ()

    def __init__(self, *sets, at=0):
        self.sets = sets
        self.at = at

    def fork(self):
        return Cycle(*self.sets, at=self.at)

    def fill_mask(self, words):
        words[:] = mask_of(list(self.sets[self.at]), len(words))

    def fill_masks(self, together, masks):
        return [met(one, words) for one, words in zip(together, masks, strict=True)]

    def advance(self, token_id):
        assert token_id in self.sets[self.at]
        self.at += 1

    @property
    def is_complete(self):
        return self.at == len(self.sets)


class Broken(Cycle):
    def fork(self):
        return Broken(*self.sets, at=self.at)

    def fill_mask(self, words):
        if self.at:
            raise InvalidRequestError("response_format is too much work", param="response_format")
        super().fill_mask(words)


def constrained(name, own, constraint, **options):
    options = {"ignore_eos": False, "max_tokens": 12} | options
    wanted = request(name, [3, 1, 4], own, **options)
    object.__setattr__(wanted, "constraint", constraint)
    return wanted


SETS = ([5, 7, 9, 11], [2, 11], [0, 20, 21, 22], [30], [0, 31])


@pytest.mark.parametrize("own", MIXTURES, ids=lambda m: f"{m.merge.name}~{m.gate.name}")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(4))
def test_every_token_is_an_allowed_one(own, sampling):
    engine = make_engine()
    engine.add(constrained("x", own, Cycle(*SETS), n=3, logprobs=True, top_logprobs=5, **sampling))
    for answer in run(engine).values():
        tokens = ids(answer)
        assert answer[-1].finish_reason == "stop"
        assert len(tokens) in (3, 5)
        for token, allowed in zip(tokens, SETS, strict=False):
            assert token in allowed
        # The merge over what is allowed: the likeliest are of it, and no more than there are.
        for output, allowed in zip(answer, SETS, strict=False):
            assert {i for i, _ in output.top} <= set(allowed)
            assert output.logprob <= 1e-6
    assert engine.num_free_rows == 16


def test_an_answer_ends_with_the_token_after_which_nothing_may_follow():
    engine = make_engine()
    engine.add(constrained("x", MIXTURES[0], Cycle([5], [6])))
    (answer,) = run(engine).values()
    assert ids(answer) == [5, 6]
    assert [output.finish_reason for output in answer] == [None, "stop"]


def test_an_answer_that_is_cut_says_so():
    engine = make_engine()
    engine.add(constrained("x", MIXTURES[0], Cycle([5], [6], [7]), max_tokens=2))
    (answer,) = run(engine).values()
    assert answer[-1].finish_reason == "length"


def test_a_mask_is_a_ban_before_the_gate_and_the_merge():
    """The oracle: the same tokens banned by `logit_bias`, which precedes both."""
    allowed = [5, 7, 9, 11, 20, 21]
    others = {i: -100.0 for i in range(VOCAB) if i not in allowed}
    for own in MIXTURES:
        free = request("free", [3, 1, 4], own, max_tokens=1, logprobs=True, logit_bias=others)
        bound = constrained("bound", own, Cycle(allowed), max_tokens=1, logprobs=True)
        engine = make_engine()
        engine.add(free)
        engine.add(bound)
        outputs = run(engine)
        (a,), (b,) = outputs["free", 0], outputs["bound", 0]
        assert (a.token_id, a.logprob) == (b.token_id, b.logprob)


def test_an_answer_in_company_of_a_constrained_one_is_the_same():
    alone, together = make_engine(), make_engine()
    free = request("free", [9, 2, 6], MIXTURES[1], seed=3, max_tokens=8)
    alone.add(free)
    together.add(constrained("bound", MIXTURES[2], Cycle(*SETS), n=2))
    together.add(free)
    assert ids(run(alone)["free", 0]) == ids(run(together)["free", 0])


def test_bans_that_leave_nothing_end_the_answer_and_no_other():
    engine = make_engine()
    bans = {2: -100.0, 11: -100.0}
    engine.add(constrained("none", MIXTURES[1], Cycle(*SETS), logit_bias=bans))
    engine.add(constrained("some", MIXTURES[1], Cycle(*SETS)))
    outputs = run(engine)
    assert [output.error is None for output in outputs["none", 0]] == [True, False]
    error = outputs["none", 0][-1].error
    assert isinstance(error, InvalidRequestError)
    assert (error.param, "logit_bias" in str(error)) == ("response_format", True)
    assert outputs["some", 0][-1].finish_reason == "stop"
    assert engine.num_free_rows == 16


def test_a_grammar_that_becomes_too_much_work_ends_its_answer_with_that():
    engine = make_engine()
    engine.add(constrained("x", MIXTURES[0], Broken([5], [6])))
    (answer,) = run(engine).values()
    assert "too much work" in str(answer[-1].error)
    assert answer[0].token_id == 5


def test_a_step_without_memory_leaves_a_constrained_answer_as_it_would_have_been():
    class Forgetful(FakeModel):
        left = 3

        def decode(self, *args):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("no memory")
            return super().decode(*args)

    def answers(model):
        engine = make_engine(model)
        for name in ("old", "new"):
            engine.add(constrained(name, MIXTURES[1], Cycle(*SETS[:2], [20], *SETS[3:]), seed=4))
        return run(engine)

    calm, shaken = answers(FakeModel()), answers(Forgetful())
    assert shaken["new", 0][-1].error is not None
    assert ids(shaken["old", 0]) == ids(calm["old", 0])


def test_tokens_that_mean_the_end_give_it_their_probability_where_it_may_come():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, -1.0, 5.0]])
    expected = logits[:, [0, 3]].exp().sum(-1).log()

    def end(*allowed):
        own = Cycle(list(allowed))
        own.end_ids = (3,)
        answer = AllowedTokens(own, [])
        answer.look()
        changed = logits.clone()
        constrain(changed, [range(2)], [answer])
        return changed

    both = end(0, 1)
    assert torch.allclose(both[:, 0], expected)
    assert both[:, 2:].isinf().all()
    # It may not end, or the grammar has a use for the token.
    assert end(1, 2)[:, 0].isinf().all()
    assert torch.equal(end(0, 3)[:, 0], logits[:, 0])


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 95])
def test_a_mask_is_read_to_its_last_bit(vocab_size):
    allowed = [0, vocab_size // 2, vocab_size - 1]
    own = Cycle(allowed)
    own.num_words = -(-vocab_size // 32)
    answer = AllowedTokens(own, [])
    answer.look()
    logits = torch.zeros(4, vocab_size)
    constrain(logits, [range(1, 2), [3, 0]], [None, answer])
    for row in (0, 3):
        assert logits[row].isfinite().nonzero().flatten().tolist() == allowed
    assert (logits[1:3] == 0).all()


def test_rows_that_answers_share_are_changed_once():
    own = Cycle([0, 1])
    own.end_ids = (2,)
    answers = [AllowedTokens(own.fork(), []) for _ in range(2)]
    for answer in answers:
        answer.end_ids = (2,)
        answer.look()
    logits = torch.zeros(1, 4)
    constrain(logits, [range(1)] * 2, answers)
    assert float(logits[0, 0]) == pytest.approx(np.log(2))


def test_masks_are_there_after_the_step_even_if_it_fails():
    answer = AllowedTokens(Cycle([5]), [])
    workers = MaskWorkers()
    with pytest.raises(ValueError, match="boom"), workers.looking([None, answer]):
        raise ValueError("boom")
    assert answer.words.any()


def test_masks_are_found_without_another_thread_when_the_interpreter_ends(monkeypatch):
    workers = MaskWorkers()
    with workers.looking([AllowedTokens(Cycle([5]), [])]):
        pass
    # As a pool's thread does that learns of the end.
    workers._pool.shutdown()
    for _ in range(2):
        answer = AllowedTokens(Cycle([5]), [])
        with workers.looking([answer]):
            pass
        assert answer.error is None
        assert answer.words.tolist() == mask_of([5], Cycle.num_words).tolist()
        # And no pool takes anything any more.
        monkeypatch.setattr("concurrent.futures.thread._shutdown", True)


def test_masks_that_no_thread_could_be_started_for_are_looked_for_once(monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    looks = []
    monkeypatch.setattr(Cycle, "fill_mask", lambda self, words: looks.append(words.fill(1)))
    workers = MaskWorkers()
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", no_thread)
        with workers.looking([AllowedTokens(Cycle([5]), [])]):
            pass
    assert len(looks) == 1
    with workers.looking([AllowedTokens(Cycle([6]), [])]):
        pass
    assert len(looks) == 2


def test_a_runner_that_is_a_step_ahead_gives_the_same_answers():
    """Constrained and free answers, that come and go, on the device's runner and on the host's."""

    def answers(engine):
        outputs = {}
        for step in range(200):
            if step in (0, 2):
                for own in MIXTURES[:2]:
                    name = f"{step}/{own.canonical}/{len(own.states)}"
                    engine.add(constrained(name, own, Cycle(*SETS), n=2, seed=step))
                    engine.add(request(f"free {name}", [5, step], own, seed=step, max_tokens=6))
            for output in engine.step():
                outputs.setdefault((output.request_id, output.index), []).append(output.token_id)
        assert engine.num_free_rows == CONFIG.max_rows
        return outputs

    assert answers(device_engine(FakeModel())) == answers(host_engine(FakeModel()))
