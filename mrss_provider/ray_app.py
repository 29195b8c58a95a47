"""The same server as a Ray Serve application: one ingress, engines behind it, scaled by Ray.

    serve run mrss_provider.ray_app:build min_engines=2 max_engines=4 model=/models/g1

The ingress is `server.app`, its `Backend` a Ray handle; an engine is an `AsyncEngine`, a replica.
Requests that begin alike go to the same engine, whose cache then holds what they begin with. Needs
the extra `[ray]`; nothing imports this module.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.types import ASGIApp

from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import Delta, DeltaStream, GenerateRequest, ModelCard, StreamInfo
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.errors import (
    ConfigError,
    EngineError,
    EngineUnavailableError,
    MRSSError,
    QueueFullError,
)
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import KeyRing, check_exposure

# An answer that waits costs the ingress next to nothing: the engines say how many there may be.
_INGRESS_ONGOING = 4096
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# Of a prompt without turns: long enough to tell prompts apart, short enough to be in the cache.
_OPENING_LEN = 256


@dataclass(frozen=True)
class RayConfig:
    """How many engines Ray runs, and what each of them is given.

    Attributes:
        min_engines: engines that always run.
        max_engines: engines under load; equal to `min_engines` is no autoscaling.
        ongoing: requests an engine has at once, on average, before Ray starts another.
        cpus: CPU cores that Ray reserves for an engine.
        gpus: cards that Ray gives to an engine; without any, torch sees none.
    """

    min_engines: int = 1
    max_engines: int = 1
    ongoing: float = 8.0
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_engines <= self.max_engines:
            raise ConfigError(
                "min_engines must be in [1, max_engines], got "
                f"{self.min_engines} and {self.max_engines}",
                param="min_engines",
            )
        for name in ("ongoing", "cpus", "gpus"):
            value = getattr(self, name)
            if not value >= (0 if name == "gpus" else 0.01):
                raise ConfigError(f"{name} must be above 0, got {value!r}", param=name)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Return the application for `serve run`, `serve deploy` and `serve.run`.

    Args:
        args: fields of `RayConfig`, `EngineConfig` and `ServerConfig` by name, as text or as
            themselves; what is left out is read from `MRSS_*`, then takes its default.

    Raises:
        ConfigError: an unknown argument, or a bad value.
    """
    ray_config, engine_config, server_config = read_args(args)
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=engine_config.max_rows,
        max_queued_requests=engine_config.max_queued,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        ray_actor_options={"num_cpus": ray_config.cpus, "num_gpus": ray_config.gpus},
        graceful_shutdown_timeout_s=server_config.drain_s,
        **_replicas(ray_config),
    ).bind(engine_config)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        max_ongoing_requests=_INGRESS_ONGOING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=server_config.drain_s,
    )
    return ingress.bind(engine, server_config, engine_config.model.name)


def read_args(args: Mapping[str, Any]) -> tuple[RayConfig, EngineConfig, ServerConfig]:
    """Return the three configurations that `build` is given.

    Raises:
        ConfigError: an unknown argument, or a bad value.
    """
    known = {f.name for cls in (RayConfig, EngineConfig, ServerConfig) for f in fields(cls)}
    unknown = sorted(set(args) - known)
    if unknown:
        raise ConfigError(
            f"unknown argument {unknown[0]!r}; known are {', '.join(sorted(known))}",
            param=unknown[0],
        )
    env = {**os.environ, **{f"MRSS_{name.upper()}": str(value) for name, value in args.items()}}
    return _ray_config(env), EngineConfig.from_env(env=env), ServerConfig.from_env(env=env)


def routing_key(request: GenerateRequest) -> str:
    """Return what requests of one conversation share: a hash of how it begins, and of its owner.

    That is all up to the first message of the user, which every later turn repeats, or a prompt's
    first characters or tokens. The mixture is left out: states are cached one by one.
    """
    opening: list[object] = [request.owner]
    for message in request.messages or ():
        opening.append((message.role, message.content))
        if message.role == "user":
            break
    if request.prompt is not None:
        opening.append(request.prompt[:_OPENING_LEN])
    return hashlib.sha256(repr(opening).encode()).hexdigest()


class EngineReplica:
    """One engine. Ray takes it into service when its model is loaded."""

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]
        self._engine = AsyncEngine(config)
        await self._engine.start()

    async def generate(
        self, request: GenerateRequest
    ) -> AsyncIterator[StreamInfo | list[Delta] | MRSSError]:
        """Yield what admission told, then deltas: all that are here at once; an error is the last.

        An error is a value, because Ray would wrap what is raised.
        """
        deltas: list[Delta] = []
        try:
            stream = await self._engine.open(request)
        except MRSSError as exc:
            yield exc
            return
        try:
            yield stream.info
            async for delta in stream:
                deltas.append(delta)
                if not stream.ready():
                    yield deltas
                    deltas = []
        except MRSSError as exc:
            if deltas:
                yield deltas
            yield exc
        else:
            if deltas:
                yield deltas
        finally:
            await stream.aclose()

    async def models(self) -> list[ModelCard]:
        """Return the names that are served."""
        return await self._engine.models()

    async def check_health(self) -> None:
        """Raise where the engine takes no requests: Ray then replaces this replica."""
        await self._engine.models()

    async def __del__(self) -> None:
        await self._engine.aclose()


class Ingress:
    """The server's routes; `serve.ingress` builds its application in each replica."""

    def __init__(self, engine: Any, config: ServerConfig, model: str) -> None:
        self._backend = RayBackend(engine)
        self._config = config
        self._model = model

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application (Ray asks for it after the constructor).

        Raises:
            ConfigError: the keys cannot be read, or others reach it without any.
        """
        keys = KeyRing.of(self._config)
        check_exposure(self._config, keys)
        return create_app(self._backend, self._config, model=self._model, keys=keys)


class RayBackend:
    """A `Backend` over the handle of the engines.

    Args:
        engine: a `DeploymentHandle` of `EngineReplica`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def open(self, request: GenerateRequest) -> DeltaStream:
        """Admit a request at one of the engines.

        Raises:
            QueueFullError: all engines have all that they take.
            EngineUnavailableError: the engine died.
            MRSSError: the engine refused it.
        """
        handle = self._engine.options(stream=True, session_id=routing_key(request))
        parts = _Parts(handle.generate.remote(request))
        try:
            info = await parts.next()
        except BaseException:
            parts.cancel()
            raise
        assert isinstance(info, StreamInfo)
        return RayStream(info, parts)

    async def models(self) -> list[ModelCard]:
        """Return the names that any of the engines serves: all load the same files.

        Raises:
            EngineUnavailableError: no engine answers.
        """
        try:
            cards: list[ModelCard] = await self._engine.models.remote()
        except (RayError, RayServeException) as exc:
            raise _translate(exc) from exc
        return cards

    async def aclose(self) -> None:
        """Do nothing: the engines are Ray's."""


class RayStream:
    """A `DeltaStream` of one engine's answer."""

    def __init__(self, info: StreamInfo, parts: _Parts) -> None:
        self.info = info
        self._parts = parts
        self._ready: deque[Delta] = deque()

    def __aiter__(self) -> RayStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._ready:
            part = await self._parts.next()
            if part is None:
                raise StopAsyncIteration
            assert isinstance(part, list)
            self._ready.extend(part)
        return self._ready.popleft()

    def ready(self) -> bool:
        """Tell whether the next delta is already here."""
        return bool(self._ready)

    async def aclose(self) -> None:
        """Abort what still runs; idempotent."""
        self._ready.clear()
        self._parts.cancel()


class _Parts:
    """What `EngineReplica.generate` yields, its errors raised and Ray's translated."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._is_over = False

    async def next(self) -> StreamInfo | list[Delta] | None:
        """Return the next part, None at the end.

        Raises:
            MRSSError: the engine's, or what stands for one of Ray's.
        """
        if self._is_over:
            return None
        try:
            part: StreamInfo | list[Delta] | MRSSError = await anext(self._response)
        except StopAsyncIteration:
            self._is_over = True
            return None
        except (RayError, RayServeException) as exc:
            self._is_over = True
            raise _translate(exc) from exc
        if isinstance(part, MRSSError):
            self._is_over = True
            raise part
        return part

    def cancel(self) -> None:
        """Abort the answer; idempotent."""
        if not self._is_over:
            self._is_over = True
            self._response.cancel()


def _translate(exc: Exception) -> MRSSError:
    if isinstance(exc, BackPressureError):
        return QueueFullError("all engines are busy and the queue is full; try again soon")
    if isinstance(exc, RayTaskError):
        return EngineError(f"the engine failed: {exc.cause!r}")
    return EngineUnavailableError(f"the engine's answer broke off ({type(exc).__name__})")


def _replicas(config: RayConfig) -> dict[str, Any]:
    if config.min_engines == config.max_engines:
        return {"num_replicas": config.min_engines}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_engines,
            max_replicas=config.max_engines,
            target_ongoing_requests=config.ongoing,
        )
    }


def _ray_config(env: Mapping[str, str]) -> RayConfig:
    values: dict[str, Any] = {}
    for field in fields(RayConfig):
        text = env.get(f"MRSS_{field.name.upper()}")
        if not text:
            continue
        kind = int if isinstance(field.default, int) else float
        try:
            values[field.name] = kind(text)
        except ValueError as exc:
            raise ConfigError(
                f"{field.name} must be a number, got {text!r}", param=field.name
            ) from exc
    return RayConfig(**values)
