"""The clients of the matrix that speak OpenAI's wire: one interface, `replies.Reply` comes back.

A parameter that OpenAI does not have goes into `extra_body`, as a user of these clients would do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import openai
from conformance import replies
from conformance.replies import Reply
from conformance.routes import KEY, Route

TIMEOUT_S = 60.0
Body = Mapping[str, Any]


def dumped(chunks: Iterable[Any]) -> list[Body]:
    """Return pydantic objects as what was on the wire."""
    return [chunk.model_dump() for chunk in chunks]


class OpenAISync:
    """`openai.OpenAI`."""

    def __init__(self, route: Route) -> None:
        self.route = route

    @cached_property
    def api(self) -> Any:
        """The client."""
        return openai.OpenAI(base_url=self.route.url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)

    def _chat(self, params: Body) -> dict[str, Any]:
        name = params.get("model", "tone")
        return {**params, "model": self.route.model(name)}

    def chat(self, **params: Any) -> Reply:
        """Ask for a whole chat."""
        return replies.read_chat(self._call("chat.completions", self._chat(params)).model_dump())

    def stream(self, **params: Any) -> Reply:
        """Stream a chat, and put it together."""
        params = {**self._chat(params), "stream": True}
        return replies.read_stream(dumped(self._iterate("chat.completions", params)))

    def complete(self, **params: Any) -> Reply:
        """Ask for a whole completion."""
        body = self._call("completions", self._chat(params)).model_dump()
        return replies.read_completion(body)

    def complete_stream(self, **params: Any) -> Reply:
        """Stream a completion, and put it together."""
        params = {**self._chat(params), "stream": True}
        return replies.read_completion_stream(dumped(self._iterate("completions", params)))

    def embed(self, **params: Any) -> tuple[list[Any], Body]:
        """Return the vectors as they come, and the usage."""
        name = params.get("model", "tone")
        params = {**params, "model": self.route.embedding_prefix + name}
        body = self._call("embeddings", params).model_dump()
        return [entry["embedding"] for entry in body["data"]], body["usage"]

    def models(self) -> list[str]:
        """Return the names that the route lists."""
        return [model.id for model in self.api.models.list()]

    def respond(self, **params: Any) -> tuple[str, Body]:
        """Ask `/v1/responses`; return text and usage."""
        answer = self._call("responses", self._chat(params))
        return answer.output_text, answer.usage.model_dump()

    def respond_stream(self, **params: Any) -> tuple[str, Body]:
        """Do as `respond`, streamed: the text of the pieces, the usage of the end."""
        events = list(self._iterate("responses", {**self._chat(params), "stream": True}))
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        return text, events[-1].response.usage.model_dump()

    def leave(self, **params: Any) -> None:
        """Stream a chat, and go after its first piece."""
        with self._call("chat.completions", {**self._chat(params), "stream": True}) as chunks:
            next(iter(chunks))

    def _resource(self, path: str) -> Any:
        api = self.api
        for part in path.split("."):
            api = getattr(api, part)
        return api

    def _call(self, path: str, params: Body) -> Any:
        return self._resource(path).create(**params)

    def _iterate(self, path: str, params: Body) -> Iterable[Any]:
        return list(self._resource(path).create(**params))


class OpenAIAsync(OpenAISync):
    """`openai.AsyncOpenAI`; one loop for the whole run, since its connections belong to one."""

    _runner: asyncio.Runner | None = None

    @cached_property
    def api(self) -> Any:
        """The client."""
        return openai.AsyncOpenAI(
            base_url=self.route.url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S
        )

    def models(self) -> list[str]:
        """Return the names that the route lists."""

        async def listed() -> list[str]:
            return [model.id async for model in self.api.models.list()]

        return self._run(listed())

    def leave(self, **params: Any) -> None:
        """Stream a chat, and go after its first piece."""

        async def go() -> None:
            body = {**self._chat(params), "stream": True}
            async with await self.api.chat.completions.create(**body) as chunks:
                await anext(aiter(chunks))

        self._run(go())

    def _call(self, path: str, params: Body) -> Any:
        return self._run(self._resource(path).create(**params))

    def _iterate(self, path: str, params: Body) -> Iterable[Any]:
        async def read() -> list[Any]:
            return [chunk async for chunk in await self._resource(path).create(**params)]

        return self._run(read())

    @classmethod
    def _run(cls, coroutine: Any) -> Any:
        if OpenAIAsync._runner is None:
            OpenAIAsync._runner = asyncio.Runner()
        return OpenAIAsync._runner.run(coroutine)


class LiteLLM(OpenAISync):
    """`litellm`'s SDK: its `openai/` before our server, its `litellm_proxy/` before a proxy."""

    def _chat(self, params: Body) -> dict[str, Any]:
        name = self.route.model(params.get("model", "tone"))
        return {**params, **self._where(name)}

    def _where(self, name: str) -> dict[str, Any]:
        prefix = "openai" if self.route.id == "server" else "litellm_proxy"
        where = {"model": f"{prefix}/{name}", "api_base": self.route.url, "api_key": KEY}
        return {**where, "timeout": TIMEOUT_S, "num_retries": 0}

    def embed(self, **params: Any) -> tuple[list[Any], Body]:
        """Return the vectors as they come, and the usage."""
        where = self._where(self.route.embedding_prefix + params.pop("model", "tone"))
        body = _sdk("embeddings")(**params, **where).model_dump()
        return [entry["embedding"] for entry in body["data"]], body["usage"]

    def leave(self, **params: Any) -> None:
        """Stream a chat, and go after its first piece."""
        chunks = _sdk("chat.completions")(**self._chat(params), stream=True)
        next(iter(chunks))
        # The SDK has no way to close a stream but to forget it.
        del chunks

    def _call(self, path: str, params: Body) -> Any:
        return _sdk(path)(**params)

    def _iterate(self, path: str, params: Body) -> Iterable[Any]:
        return list(_sdk(path)(**params))


def _sdk(path: str) -> Any:
    """Return LiteLLM's function for a route; importing it takes seconds."""
    import litellm

    return {
        "chat.completions": litellm.completion,
        "completions": litellm.text_completion,
        "embeddings": litellm.embedding,
        "responses": litellm.responses,
    }[path]


class LiteLLMAlone(LiteLLM):
    """The SDK with our provider in its own process, and no proxy."""

    def __init__(self, route: Route) -> None:
        import mrss_provider

        super().__init__(route)
        mrss_provider.register()

    def _where(self, name: str) -> dict[str, Any]:
        return {
            "model": f"mrss/{name}",
            "api_base": self.route.url,
            "timeout": TIMEOUT_S,
            "num_retries": 0,
        }

    def _chat(self, params: Body) -> dict[str, Any]:
        where = self._where(params.get("model", "tone"))
        where["allowed_openai_params"] = ["reasoning_effort", "thinking"]
        # The timeout is LiteLLM's own here, and not the engine's parameter.
        extra = dict(params.get("extra_body", {}))
        where["timeout"] = extra.pop("timeout", TIMEOUT_S)
        return {**params, **where, "extra_body": extra}

    def embed(self, **params: Any) -> tuple[list[Any], Body]:
        """Return the vectors as they come, and the usage."""
        where = self._where(params.pop("model", "tone"))
        body = _sdk("embeddings")(**params, **where).model_dump()
        return [entry["embedding"] for entry in body["data"]], body["usage"]
