"""What answers cost by LiteLLM's account, and who may not ask any more when the money is spent."""

import asyncio
import uuid

import litellm
import pytest
from fakes import PROMPT_TOKENS, FakeBackend, text
from litellm.integrations.custom_logger import CustomLogger

from mrss_provider.backend import Delta, Usage

HI = [{"role": "user", "content": "Hi"}]
PRICES = {
    "input_cost_per_token": 1e-3,
    "output_cost_per_token": 1e-1,
    "cache_read_input_token_cost": 1e-4,
}
CACHED, COMPLETION = 4, 3
COST = (PROMPT_TOKENS - CACHED) * 1e-3 + CACHED * 1e-4 + COMPLETION * 1e-1


class Costs(CustomLogger):
    """What LiteLLM's callbacks are told, which its budgets go by."""

    def __init__(self, entry):
        self.told = asyncio.Queue()
        self._id = entry["model_info"]["id"]

    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        # LiteLLM may tell now what it was asked before this test.
        if kwargs["litellm_params"].get("model_info", {}).get("id") == self._id:
            await self.told.put(kwargs["response_cost"])


@pytest.fixture(autouse=True)
def callbacks(monkeypatch):
    """LiteLLM's lists, which take but one callback of each class, and keep it."""
    for kind in ("callbacks", "success_callback", "_async_success_callback"):
        monkeypatch.setattr(litellm, kind, [])


@pytest.fixture
def backend():
    usage = Usage(PROMPT_TOKENS, COMPLETION, CACHED)
    return FakeBackend([*map(text, "abc"), Delta(finish_reason="stop"), Delta(usage=usage)])


def entry():
    # LiteLLM remembers the prices of an id.
    info = {"id": uuid.uuid4().hex, "mode": "chat", **PRICES}
    return {
        "model_name": "paid",
        "litellm_params": {"model": "mrss/tone"},
        "model_info": info,
    }


CALLS = {
    "chat": lambda router, **options: router.acompletion("paid", messages=HI, **options),
    "text": lambda router, **options: router.atext_completion(model="paid", prompt="Hi", **options),
}


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_an_answer_costs_its_tokens_at_the_prices_of_its_entry(call, stream):
    async def main():
        paid = entry()
        costs = Costs(paid)
        litellm.callbacks.append(costs)
        router = litellm.Router([paid])
        answer = await CALLS[call](router, stream=stream)
        if stream:
            async for _ in answer:
                pass
        return await asyncio.wait_for(costs.told.get(), 10)

    assert asyncio.run(main()) == pytest.approx(COST)


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param({"max_budget": COST / 2, "budget_duration": "1d"}, id="deployment"),
        pytest.param({"budget_limit": COST / 2, "time_period": "1d"}, id="provider"),
    ],
)
def test_a_budget_that_is_spent_refuses_what_comes_next(backend, limit):
    async def main():
        paid, options = entry(), {}
        if "max_budget" in limit:
            paid["litellm_params"] |= limit
        else:
            options = {"provider_budget_config": {"mrss": limit}}
        router = litellm.Router([paid], num_retries=0, **options)
        costs = Costs(paid)
        litellm.callbacks.append(costs)
        await router.acompletion("paid", messages=HI)
        # After the router's own callback, which was there first.
        await asyncio.wait_for(costs.told.get(), 10)
        # Of which a proxy makes a 429.
        with pytest.raises(ValueError, match="crossed budget"):
            await router.acompletion("paid", messages=HI)

    asyncio.run(main())
    assert len(backend.requests) == 1


@pytest.mark.usefixtures("provider")
def test_a_budget_manager_counts_a_users_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(litellm, "model_cost", dict(litellm.model_cost))
    litellm.register_model({"mrss/tone": {"litellm_provider": "mrss", "mode": "chat", **PRICES}})
    manager = litellm.BudgetManager(project_name="test")
    manager.create_budget(total_budget=1.0, user="u")
    manager._save_data_thread = lambda: None
    for _ in range(2):
        manager.update_cost(user="u", completion_obj=litellm.completion("mrss/tone", messages=HI))
    assert manager.get_current_cost("u") == pytest.approx(2 * COST)
