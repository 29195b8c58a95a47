"""`handler`, the provider's one instance, and `register`, which makes it known to LiteLLM."""

from __future__ import annotations

from typing import Any

import litellm
from litellm.utils import custom_llm_setup

from mrss_provider.backend import Backend, ModelCard
from mrss_provider.errors import ConfigError
from mrss_provider.provider.custom_llm import MRSSProvider
from mrss_provider.provider.error_map import PROVIDER

handler = MRSSProvider()


def register(engine: Backend | None = None) -> None:
    """Make `mrss/...` models known to LiteLLM in this process; idempotent.

    A proxy does not need this: its configuration names `mrss_provider.handler`.

    Modifies LiteLLM's provider map (other entries stay), its model list and prices, and turns on
    `enable_caching_on_provider_specific_optional_params`, without which its cache would give one
    mixture's answer for another.

    Args:
        engine: an engine of this process (`AsyncEngine`), for calls without an `api_base`. None
            leaves what was given before, at first an engine process, found or started.

    Raises:
        ConfigError: `engine` is no engine.
        MRSSError: it cannot be loaded; what was there before stays.
    """
    if not any(entry["provider"] == PROVIDER for entry in litellm.custom_provider_map):
        litellm.custom_provider_map.append({"provider": PROVIDER, "custom_handler": handler})
    custom_llm_setup()
    litellm.enable_caching_on_provider_specific_optional_params = True
    cards = [ModelCard("base", "base")]
    if engine is not None:
        _check_engine(engine)
        cards = handler.run(engine.models())
        handler.attach(engine)
    litellm.register_model({f"{PROVIDER}/{card.id}": _entry(card) for card in cards})
    known = litellm.models_by_provider.get(PROVIDER, [])
    litellm.models_by_provider[PROVIDER] = sorted(
        {*known, *(f"{PROVIDER}/{card.id}" for card in cards)}
    )


def _check_engine(engine: object) -> None:
    methods = (getattr(engine, name, None) for name in ("open", "models", "aclose"))
    if isinstance(engine, type) or not all(map(callable, methods)):
        raise ConfigError(
            f"engine must be an engine of this process, such as AsyncEngine(), got {engine!r}; the "
            "address of one elsewhere is LiteLLM's `api_base`, or MRSS_SOCKET",
            param="engine",
        )


def abilities(card: ModelCard) -> dict[str, bool]:
    """Return what LiteLLM's model list and configurations say that a model can do."""
    has_tools = "tools" in card.supports
    return {
        "supports_function_calling": has_tools,
        "supports_tool_choice": has_tools,
        "supports_parallel_function_calling": has_tools,
        "supports_response_schema": True,
        "supports_reasoning": "thinking" in card.supports,
        "supports_vision": False,
    }


def _entry(card: ModelCard) -> dict[str, Any]:
    entry = {
        "litellm_provider": PROVIDER,
        "mode": "chat",
        "input_cost_per_token": 0.0,
        "output_cost_per_token": 0.0,
        # Unsaid, LiteLLM warns.
        "cache_read_input_token_cost": 0.0,
        "cache_creation_input_token_cost": 0.0,
        **abilities(card),
    }
    if card.context_len:
        entry |= {"max_tokens": card.context_len, "max_input_tokens": card.context_len}
    return entry
