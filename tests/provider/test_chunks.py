"""The chunks themselves: the cheap way to make one, and what LiteLLM's log gets."""

import litellm
import pytest
from litellm.types.utils import Delta as LiteLLMDelta
from litellm.types.utils import ModelResponseStream, StreamingChoices

from mrss_provider.backend import Delta, StreamInfo, Usage
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.provider.calls import read_call
from mrss_provider.provider.chunks import StreamChunks

INFO = StreamInfo("tone", 3, "print", 7)
MRSS = {"mrss": {"mixture": "tone", "rows": 3}}


def call(group=None, **params):
    return read_call(
        model="tone",
        messages=[{"role": "user", "content": "Hi"}],
        optional_params=params,
        litellm_params={"metadata": {"model_group": group}, "model_info": {"id": "an-id"}},
        api_base=None,
        api_key=None,
        timeout=None,
        logging_obj=None,
    )


def words(count):
    return [Delta(text=f" {i}", num_tokens=1) for i in range(count)]


def end(count):
    return Delta(finish_reason="length", usage=Usage(7, count, 2))


def test_chunk_made_from_a_template_is_the_one_litellm_would_make():
    chunks = StreamChunks(call())
    first, second, third = (chunks.write([word], INFO)[0] for word in words(3))
    for made, text in ((second, " 1"), (third, " 2")):
        plain = ModelResponseStream(
            id=first.id,
            created=first.created,
            model="tone",
            choices=[StreamingChoices(index=0, delta=LiteLLMDelta(content=text))],
        )
        plain._hidden_params = {"model_id": "an-id"}
        assert made == plain
        assert made.model_dump() == plain.model_dump()
        as_sent = {"exclude_none": True, "exclude_unset": True}
        assert made.model_dump_json(**as_sent) == plain.model_dump_json(**as_sent)
        assert made.choices[0].delta.model_fields_set == plain.choices[0].delta.model_fields_set
    # Nothing is shared between them.
    assert second._hidden_params is not third._hidden_params
    assert second.choices[0].delta is not third.choices[0].delta


def test_every_chunk_names_its_deployment_and_the_first_its_mixture():
    chunks = StreamChunks(call())
    made = [chunk for delta in [*words(2), end(2)] for chunk in chunks.write([delta], INFO)]
    made += chunks.end()
    assert {chunk._hidden_params["model_id"] for chunk in made} == {"an-id"}
    assert [chunk.provider_specific_fields for chunk in made] == [MRSS, None, None, None]
    assert [chunk.system_fingerprint for chunk in made] == ["print", None, None, None]


@pytest.mark.parametrize(
    ("group", "name"),
    [("mrss/tone", "mrss/tone"), ("mrss-ab", "tone"), ("mrss/*", "tone"), (None, "tone")],
)
def test_chunks_have_the_name_that_nobody_must_change(group, name):
    assert call(group).chunk_model == name


def test_litellms_log_gets_text_usage_and_mixture_of_a_stream(capfd):
    chunks = StreamChunks(call())
    made = [chunk for delta in [*words(3), end(3)] for chunk in chunks.write([delta], INFO)]
    response = litellm.stream_chunk_builder(made + chunks.end())
    assert response.choices[0].message.content == " 0 1 2"
    assert response.choices[0].finish_reason == "length"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (7, 3)
    assert response._hidden_params["provider_specific_fields"] == MRSS
    # LiteLLM prints its provider list for a model that has no price.
    capfd.readouterr()


@pytest.mark.parametrize("deltas", [[], words(1), [Delta(finish_reason="stop")]])
def test_answer_without_its_end_is_refused(deltas):
    chunks = StreamChunks(call())
    chunks.write(deltas, INFO)
    with pytest.raises(EngineUnavailableError, match="before the answer's end"):
        chunks.end()
