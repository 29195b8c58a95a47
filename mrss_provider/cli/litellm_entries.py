"""The entries of a LiteLLM configuration's `model_list`, from what an engine serves."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mrss_provider.backend import ModelCard

_TOKENS_PER_PRICE = 1_000_000
_KEY_VARIABLE = "MRSS_API_KEY"
# LiteLLM believes that an unknown provider has neither; the engine judges their values.
_ALLOWED = ["reasoning_effort", "thinking"]


@dataclass(frozen=True)
class Arm:
    """One mixture of an A/B group, and its share of the requests."""

    mixture: str
    weight: float


@dataclass(frozen=True)
class Group:
    """A name whose requests are split between mixtures."""

    name: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Wishes:
    """What the user wants in the configuration.

    Attributes:
        api_base: the engine's address; None leaves it to MRSS_SOCKET and auto-start.
        has_key: whether the engine asks for one.
        input_cost: USD for a million tokens of prompts.
        output_cost: the same of answers.
        names: mixtures that get an entry of their own.
        groups: for A/B tests.
        openai_route: add entries that reach the engine over OpenAI's wire.
        variables: engine settings that were given as flags, as `MRSS_*` variables.
    """

    api_base: str | None = None
    has_key: bool = False
    input_cost: float = 0.0
    output_cost: float = 0.0
    names: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    openai_route: bool = False
    variables: Mapping[str, str] | None = None


class Entries:
    """Makes the entries of `model_list`."""

    def __init__(self, cards: Mapping[str, ModelCard], wishes: Wishes) -> None:
        self._cards = cards
        self._wishes = wishes

    def groups(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield a comment and the entries under it."""
        names = [*self._cards, *(name for name in self._wishes.names if name not in self._cards)]
        told = (
            "What GET /v1/models lists: LiteLLM leaves wildcards out and does not ask the engine."
        )
        yield told, [self._chat(f"mrss/{name}", name) for name in names]
        yield "Any mixture: mrss/a+b:0.5 is answered by the states a and b.", [self._wildcard()]
        for group in self._wishes.groups:
            told = (
                "An A/B group: the header x-litellm-model-id tells which arm answered. Both stand\n"
                "before one engine, so neither is cooled down: that would only shift the split."
            )
            yield told, [self._arm(group.name, arm) for arm in group.arms]
        embedders = [card.id for card in self._cards.values() if "embeddings" in card.supports]
        if embedders:
            told = "Embeddings under names of their own: LiteLLM probes and prices them as such."
            yield told, [self._embedding(name) for name in embedders]
        if self._wishes.openai_route:
            told = (
                "The second way in, over OpenAI's wire, without our provider: prompts of token\n"
                "ids and `dimensions` work here."
            )
            yield told, [self._openai()]

    def _wildcard(self) -> dict[str, Any]:
        entry = self._chat("mrss/*", "*")
        entry["model_info"] |= {"health_check_model": "mrss/base"}
        return entry

    def _chat(self, model_name: str, mixture: str) -> dict[str, Any]:
        params = self._params(f"mrss/{mixture}") | {
            "allowed_openai_params": _ALLOWED,
            "additional_drop_params": ["encoding_format"],
        }
        info = {"id": model_name, "mode": "chat", **self._limits(), **self._abilities(mixture)}
        return {"model_name": model_name, "litellm_params": params, "model_info": info}

    def _arm(self, group: str, arm: Arm) -> dict[str, Any]:
        entry = self._chat(group, arm.mixture)
        entry["litellm_params"] |= {"weight": _number(arm.weight), "cooldown_time": 0}
        entry["model_info"] |= {"id": f"{group}/{arm.mixture}"}
        return entry

    def _embedding(self, name: str) -> dict[str, Any]:
        model_name = f"mrss-embedding/{name}"
        params = self._params(f"mrss/{name}") | {
            "additional_drop_params": ["encoding_format", "user"]
        }
        info = {"id": model_name, "mode": "embedding", **self._limits()}
        return {"model_name": model_name, "litellm_params": params, "model_info": info}

    def _openai(self) -> dict[str, Any]:
        params = {
            "model": "openai/*",
            "api_base": f"{(self._wishes.api_base or '').rstrip('/').removesuffix('/v1')}/v1",
            "api_key": f"os.environ/{_KEY_VARIABLE}" if self._wishes.has_key else "unused",
            "allowed_openai_params": [*_ALLOWED, "dimensions"],
            "use_chat_completions_api": True,
        }
        info = {
            "id": "mrss-openai/*",
            "mode": "chat",
            **self._limits(),
            **self._abilities("base"),
            "health_check_model": "openai/base",
        }
        return {"model_name": "mrss-openai/*", "litellm_params": params, "model_info": info}

    def _params(self, model: str) -> dict[str, Any]:
        params: dict[str, Any] = {"model": model}
        if self._wishes.api_base is not None:
            params["api_base"] = self._wishes.api_base
        if self._wishes.has_key:
            params["api_key"] = f"os.environ/{_KEY_VARIABLE}"
        return params

    def _limits(self) -> dict[str, Any]:
        limits: dict[str, Any] = {
            "input_cost_per_token": _per_token(self._wishes.input_cost),
            "output_cost_per_token": _per_token(self._wishes.output_cost),
            "cache_read_input_token_cost": _per_token(self._wishes.input_cost),
        }
        context_len = self._cards["base"].context_len
        return limits | ({"max_input_tokens": context_len} if context_len else {})

    def _abilities(self, mixture: str) -> dict[str, bool]:
        # Else its import asks the network for prices, and waits where there is none.
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        from mrss_provider.provider.registration import abilities

        # A mixture is read with the template of the model, a named one with its own.
        return abilities(self._cards.get(mixture, self._cards["base"]))


def _per_token(price: float) -> float:
    # In decimals: 0.1 / 1e6 would be written with its rounding error.
    return float(Decimal(str(price)) / _TOKENS_PER_PRICE)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
