"""What all of `mrss compare` asks with: models, parameters, a connection and its event loop."""

from __future__ import annotations

import json
import math
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import typer

from mrss_provider.compare.calls import Connection, Result
from mrss_provider.compare.cells import Pace
from mrss_provider.compare.prompts import check_params
from mrss_provider.errors import FileFormatError

# Exit statuses.
ALL_FAILED = 1
SOME_FAILED = 3


@dataclass(frozen=True)
class Asking:
    """Whom to ask, and how.

    Attributes:
        models: names.
        params: of every request.
        base_url: of a server; None is LiteLLM's SDK.
        api_key: of that server; MRSS_API_KEY when None.
        concurrency: most calls at a time.
        rate_per_s: most calls begun a second; 0 is no limit.
        timeout_s: for a whole answer.
    """

    models: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    base_url: str | None = None
    api_key: str | None = None
    concurrency: int = 4
    rate_per_s: float = 0.0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Check what goes together, before anything is written.

        Raises:
            typer.BadParameter: a key for no server.
        """
        if self.api_key is not None and self.base_url is None:
            raise typer.BadParameter(
                "--api-key goes with --base-url; LiteLLM's SDK reads each provider's own variable"
            )

    @property
    def pace(self) -> Pace:
        """How fast to ask."""
        return Pace(self.concurrency, self.rate_per_s, self.timeout_s)


def split_models(text: str) -> tuple[str, ...]:
    """Return the names of `a,b,c`.

    Raises:
        typer.BadParameter: fewer than two, or one twice.
    """
    models = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(models) < 2:
        raise typer.BadParameter(f"--models must name at least two, a comma between, got {text!r}")
    for name in models:
        if models.count(name) > 1:
            raise typer.BadParameter(f"--models names {name!r} twice")
    return models


def asked_params(
    text: str | None, temperature: float | None, max_tokens: int | None
) -> dict[str, Any]:
    """Return the parameters of every request.

    Raises:
        typer.BadParameter: no JSON object, or one that a comparison sets itself.
    """
    try:
        params = {} if text is None else check_params(json.loads(text))
    except ValueError as exc:
        raise typer.BadParameter(f"--params must be a JSON object: {exc}") from exc
    except FileFormatError as exc:
        raise typer.BadParameter(f"--params: {exc}") from exc
    if temperature is not None and not math.isfinite(temperature):
        raise typer.BadParameter(f"--temperature must be a finite number, got {temperature}")
    given = {"temperature": temperature, "max_tokens": max_tokens}
    return params | {key: value for key, value in given.items() if value is not None}


def exit_status(results: Sequence[Result]) -> int:
    """Return what the command exits with: 0, or what says whether all or some failed."""
    num_failed = sum(result.error is not None for result in results)
    if num_failed == len(results):
        return ALL_FAILED
    return SOME_FAILED if num_failed else 0


@asynccontextmanager
async def connected(asking: Asking) -> AsyncIterator[Connection]:
    """Yield a connection on the running event loop.

    Raises:
        ConfigError: no such address.
    """
    connection = _connection(asking)
    try:
        yield connection
    finally:
        await connection.aclose()


def _connection(asking: Asking) -> Connection:
    if asking.base_url is not None:
        from mrss_provider.compare.http import HttpConnection

        key = asking.api_key or os.environ.get("MRSS_API_KEY")
        return HttpConnection(asking.base_url, key)
    # What LiteLLM brought along; fetching newer prices costs seconds, and warnings where it cannot.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    from mrss_provider.compare.sdk import SdkConnection
    from mrss_provider.provider import register

    # It prints advice beside every error, which results.jsonl has.
    litellm.suppress_debug_info = True
    register()
    return SdkConnection()
