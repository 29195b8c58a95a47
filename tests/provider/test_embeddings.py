"""Embeddings through LiteLLM's SDK, against a backend that embeds."""

import asyncio
import base64
from array import array

import litellm
import pytest
from fakes import FINGERPRINT, FakeBackend

from mrss_provider.backend import Embeddings
from mrss_provider.errors import InvalidRequestError

pytestmark = pytest.mark.usefixtures("provider")


class EmbeddingBackend(FakeBackend):
    """Its vectors count: [0, 1], [1, 1], ...; `asked` are the requests."""

    def __init__(self):
        super().__init__()
        self.asked = []

    async def embed(self, request):
        self.asked.append(request)
        if request.model == "knowledge+tone":
            raise InvalidRequestError("a mixture of two states has no vector", param="model")
        vectors = tuple(array("f", [float(i), 1.0]) for i in range(len(request.inputs)))
        return Embeddings("tone", FINGERPRINT, vectors, num_tokens=9)


@pytest.fixture
def backend():
    return EmbeddingBackend()


@pytest.fixture(params=["sync", "async"])
def embed(request):
    if request.param == "sync":
        return lambda **kwargs: litellm.embedding(**{"model": "mrss/tone", **kwargs})
    return lambda **kwargs: asyncio.run(litellm.aembedding(**{"model": "mrss/tone", **kwargs}))


def test_each_input_gets_its_vector_and_usage_is_the_engines(embed):
    response = embed(input=["one", "two"])
    assert [entry["embedding"] for entry in response.data] == [[0.0, 1.0], [1.0, 1.0]]
    assert [entry["index"] for entry in response.data] == [0, 1]
    assert (response.usage.prompt_tokens, response.usage.total_tokens) == (9, 9)
    assert response.model == "mrss/tone"
    headers = response._hidden_params["additional_headers"]
    assert headers["llm_provider-x-mrss-mixture"] == "tone"


@pytest.mark.parametrize(
    ("given", "inputs"),
    [("one", ("one",)), (["a", "b"], ("a", "b")), ([3, 4], ((3, 4),)), ([[3], [4]], ((3,), (4,)))],
)
def test_inputs_of_every_form_arrive(embed, backend, given, inputs):
    embed(input=given, timeout=7)
    (request,) = backend.asked
    assert request.inputs == inputs
    assert request.timeout_s == 7.0


def test_our_parameters_arrive_from_the_top_or_from_extra_body(embed, backend):
    embed(input="a", mrss={"pooling": "last"})
    embed(input="a", extra_body={"mrss": {"pooling": "last"}, "dimensions": 1})
    assert [request.pooling for request in backend.asked] == ["last", "last"]
    assert [request.dimensions for request in backend.asked] == [None, 1]


def test_base64_is_spelled_where_it_gets_through(embed):
    (entry,) = embed(input="a", extra_body={"encoding_format": "base64"}).data
    assert list(array("f", base64.b64decode(entry["embedding"]))) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"input": ""}, "input"),
        ({"input": "a", "mrss": {"pooling": "max"}}, "mrss.pooling"),
        ({"input": "a", "poolin": "last"}, "poolin"),
        ({"input": "a", "model": "mrss/knowledge+tone"}, "two states"),
    ],
)
def test_what_cannot_be_embedded_is_a_400_that_names_it(embed, params, named):
    with pytest.raises(litellm.BadRequestError, match=named.replace(".", r"\.")) as caught:
        embed(**params)
    assert caught.value.llm_provider == "mrss"


@pytest.mark.parametrize("params", [{"encoding_format": "float"}, {"dimensions": 1}, {"user": "b"}])
def test_litellm_refuses_openais_own_parameters_unless_they_are_dropped(embed, backend, params):
    # The openai client always sends the first one, so configurations have it dropped.
    with pytest.raises(litellm.UnsupportedParamsError, match=next(iter(params))):
        embed(input="a", **params)
    assert embed(input="a", **params, additional_drop_params=list(params)).data
    assert len(backend.asked) == 1


def test_an_engine_that_cannot_embed_says_so(provider):
    provider.attach(FakeBackend())
    with pytest.raises(litellm.BadRequestError, match="cannot embed"):
        litellm.embedding("mrss/tone", input=["a"])
