"""LiteLLM's dispatch against the names that a state may have."""

import litellm
import pytest
from fakes import FakeBackend

from mrss_provider.backend import ModelCard
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import check_name

HI = [{"role": "user", "content": "Hi"}]


def admissible(name):
    try:
        return check_name(name) == name
    except InvalidRequestError:
        return False


# Every model of every company that LiteLLM knows, with and without what stands before a slash.
KNOWN = {part for key in litellm.model_cost for part in (key, key.rpartition("/")[2])}
PROVIDERS = {getattr(provider, "value", provider) for provider in litellm.provider_list}
NAMES = sorted(name for name in KNOWN | PROVIDERS if admissible(name))


def test_there_are_names_to_try():
    assert len(NAMES) > 1000
    assert {"gpt-4o", "dolphin", "groq"} <= set(NAMES)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(NAMES[::20], id="one in twenty"),
        pytest.param(NAMES, id="all", marks=pytest.mark.slow),
    ],
)
def test_no_admissible_name_goes_to_another_company(provider, names):
    # LiteLLM takes some names away from custom providers; `check_name` refuses those.
    backend = FakeBackend(cards=[ModelCard(name, "state") for name in names])
    provider.attach(backend)
    for name in names:
        litellm.completion(f"mrss/{name}", messages=HI)
    assert [request.model for request in backend.requests] == names
