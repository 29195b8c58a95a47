"""Answers that conform to a schema, through AsyncEngine: random schemas, random weights.

With temperature 1 and above such a model writes whatever the grammar allows.
"""

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_schemas import schemas
from tiny_model import write_model_folder, write_state

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest, Grammar, Message
from mrss_provider.config import EngineConfig
from mrss_provider.errors import InvalidRequestError
from mrss_provider.grammar.schema import HONOURED, REFUSED
from mrss_provider.sampling_params import SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alpha", "beta"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


COLOURS = Grammar("regex", "(red|green){2}", "mrss.regex")
RANDOM = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def schema_grammar(schema):
    return Grammar("json_schema", json.dumps(schema))


def ask(grammar, model="knowledge+tone", *, n=1, messages=None, prompt=None, **sampling):
    given_ = {"seed": 5, "max_tokens": 200, "temperature": 1.0, "top_p": 1.0} | sampling
    messages = messages or (Message("user", "Hello"),)
    return GenerateRequest(
        model,
        SamplingParams(**given_),
        messages=None if prompt else messages,
        prompt=prompt,
        n=n,
        grammar=grammar,
    )


class Answers:
    """An engine on a loop of its own thread, asked from this one."""

    def __init__(self, config):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.engine = AsyncEngine(config)

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(300)

    async def _read(self, request):
        stream = await self.engine.open(request)
        try:
            deltas = [delta async for delta in stream]
        except InvalidRequestError as error:
            # What cannot be honoured is refused before the answer.
            raise AssertionError(error) from error
        found = []
        for index in range(request.n):
            own = [delta for delta in deltas if delta.index == index]
            text = "".join(delta.text for delta in own)
            found.append((text, next(d.finish_reason for d in own if d.finish_reason)))
        return found

    def read(self, request):
        """Return text and finish_reason of each answer."""
        return self.run(self._read(request))

    def read_all(self, requests):
        """Return the same for requests at a time, or why one was refused."""

        async def read_all():
            reading = [self._read(request) for request in requests]
            return await asyncio.gather(*reading, return_exceptions=True)

        found = self.run(read_all())
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, InvalidRequestError):
                raise each
        return found

    def text(self, request):
        ((text, reason),) = self.read(request)
        assert reason == "stop"
        return text

    def close(self):
        self.run(self.engine.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextmanager
def refused(param, told):
    with pytest.raises(InvalidRequestError) as caught:
        yield
    assert caught.value.param == param
    assert told in str(caught.value)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "states").mkdir()
    for seed, name in enumerate(("knowledge", "tone")):
        write_state(folder / "states" / f"{name}.pth", seed=seed)
    found = Answers(
        EngineConfig(
            model=write_model_folder(folder / "model"),
            states=folder / "states",
            device="cpu",
            dtype="fp32",
            threads=1,
            max_rows=32,
            max_context_len=1000,
            prefill_chunk_len=16,
        )
    )
    yield found
    found.close()


def random_request(schema, **options):
    """Ask a model of random weights; `"`, `}`, `]` and the end are likely, or it never ends."""
    closing = {1 + ord(char): 3.0 for char in '"}]'} | {0: 5.0}
    return ask(schema_grammar(schema), "tone", logit_bias=closing, **options)


def check_answers(schema, found):
    """Check that what ended by itself validates and that a refusal names a keyword.

    Returns how many answers ended by themselves, None for a refusal.
    """
    if isinstance(found, InvalidRequestError):
        told = str(found)
        has_keyword = any(repr(word) in told for word in HONOURED | REFUSED)
        assert has_keyword or "allows no answer" in told, told
        assert found.param == "response_format"
        return None
    done = [json.loads(text) for text, reason in found if reason == "stop"]
    for value in done:
        jsonschema.Draft202012Validator(schema).validate(value)
    return len(done)


@settings(RANDOM, max_examples=3)
@given(some=st.lists(schemas(), min_size=5, max_size=5))
def test_random_schemas_are_followed_or_refused_by_keyword(answers, some):
    found = answers.read_all([random_request(schema, max_tokens=50) for schema in some])
    for schema, each in zip(some, found, strict=True):
        check_answers(schema, each)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_schemas_are_followed_or_refused_by_keyword(answers):
    counts = []

    @settings(RANDOM, max_examples=125)
    @given(some=st.lists(schemas(), min_size=8, max_size=8))
    def each(some):
        wanted = [random_request(schema, n=2, max_tokens=120, seed=len(counts)) for schema in some]
        found = answers.read_all(wanted)
        counts.extend(map(check_answers, some, found))

    each()
    followed = [count for count in counts if count is not None]
    assert len(counts) == 1000
    assert len(followed) > 400
    assert sum(followed) > len(followed)


@pytest.mark.parametrize(
    ("model", "sampling"),
    [
        ("base", {"temperature": 0.0}),
        ("knowledge+tone", {"temperature": 2.0, "top_k": 20}),
        pytest.param(
            "knowledge:0.3+tone~linear~fixed",
            {"min_p": 0.05, "frequency_penalty": 1.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "knowledge+tone~product~posterior",
            {"logit_bias": {35: 4.0}, "repetition_penalty": 1.4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_answers_conform_under_every_mixture_and_sampling(answers, model, sampling):
    for text, reason in answers.read(ask(schema_grammar(PERSON), model, n=3, **sampling)):
        assert reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)


def test_a_traced_answer_and_one_with_log_probabilities_conform_too(answers):
    wanted = ask(COLOURS, logprobs=True, top_logprobs=3)
    plain = answers.text(wanted)
    traced = replace(wanted, mixture=replace(wanted.mixture, trace=True))
    assert answers.text(traced) == plain
    assert plain in {"redred", "redgreen", "greenred", "greengreen"}


def test_a_text_completion_conforms_and_has_no_lead(answers):
    assert answers.text(ask(COLOURS, prompt="Colours:")) in {
        "redred",
        "redgreen",
        "greenred",
        "greengreen",
    }


def test_the_stop_string_of_the_template_ends_no_answer(answers):
    words = Grammar("lark", 'start: "one\\n\\ntwo"', "mrss.grammar")
    assert answers.text(ask(words)) == "one\n\ntwo"
    assert answers.text(ask(words, stop=("\n\n",))) == "one"


def test_a_last_message_of_the_assistant_is_gone_on_with(answers):
    begun = (Message("user", "Hello"), Message("assistant", '{"name": "Zo'))
    rest = answers.text(ask(schema_grammar(PERSON), messages=begun))
    assert json.loads('{"name": "Zo' + rest)["name"].startswith("Zo")
    begun = (Message("user", "Hello"), Message("assistant", "Well, "))
    with refused("response_format", "must allow how the answer begins"):
        answers.read(ask(schema_grammar(PERSON), messages=begun))


def test_a_session_goes_on_with_an_answer_that_was_cut(answers):
    first = ask(schema_grammar(PERSON), n=1)
    info = answers.run(answers.engine.create_session(replace(first, grammar=None)))
    cut = replace(
        first,
        messages=(Message("user", "And?"),),
        session=info.id,
        session_save=True,
        sampling=replace(first.sampling, max_tokens=6),
    )
    ((begin, reason),) = answers.read(cut)
    assert reason == "length"
    rest = answers.text(replace(first, messages=(), session=info.id))
    jsonschema.validate(json.loads(begin + rest), PERSON)
    with refused("response_format", "a session is made of a prompt"):
        answers.run(answers.engine.create_session(first))


def test_what_asks_for_two_things_is_refused():
    grammar = schema_grammar(PERSON)
    with refused("response_format", "must be left out with mrss.given"):
        GenerateRequest("base", SamplingParams(), prompt="x", given="y", grammar=grammar)
    with refused("ignore_eos", "must be false"):
        GenerateRequest("base", SamplingParams(ignore_eos=True), prompt="x", grammar=grammar)


def test_a_seed_has_one_text_and_a_grammar_is_compiled_once(answers):
    wanted = ask(Grammar("regex", "(cat|dog|once){2}", "mrss.regex"), n=2)
    before = answers.engine._slot.loaded.grammars.stats()
    assert answers.read(wanted) == answers.read(wanted)
    after = answers.engine._slot.loaded.grammars.stats()
    assert (after.num_compiled, after.num_hits) == (before.num_compiled + 1, before.num_hits + 1)


def test_an_answer_that_is_cut_says_length_and_may_be_a_beginning(answers):
    ((text, reason),) = answers.read(ask(schema_grammar(PERSON), max_tokens=4))
    assert reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
