"""LangChain and Instructor: what their users call, as `replies.Reply`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import instructor
import openai
from conformance.clients import TIMEOUT_S
from conformance.replies import Call, Choice, Reply, text_entries
from conformance.routes import KEY, Route
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, create_model

# What ChatOpenAI takes by the same name; the others go with each call.
_FIELDS = ("temperature", "seed", "n", "logprobs", "top_logprobs", "max_tokens", "stop")


class LangChain:
    """`ChatOpenAI`, `OpenAI` and `OpenAIEmbeddings`."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def chat(self, **params: Any) -> Reply:
        """Ask for a whole chat."""
        model, bound, messages = self._model(params)
        generated = model.generate([_messages(messages)], **bound)
        choices = [_choice(generation.message) for generation in generated.generations[0]]
        output = generated.llm_output or {}
        usage = output.get("token_usage")
        return Reply(choices, usage, output.get("system_fingerprint"))

    def stream(self, **params: Any) -> Reply:
        """Stream a chat, and put it together as LangChain does."""
        usage = (params.pop("stream_options", None) or {}).get("include_usage", False)
        model, bound, messages = self._model(params, stream_usage=usage)
        whole: AIMessageChunk | None = None
        num_chunks = 0
        for chunk in model.stream(messages, **bound):
            whole = chunk if whole is None else whole + chunk
            num_chunks += bool(chunk.content or chunk.tool_call_chunks)
        assert whole is not None
        told = whole.usage_metadata
        counts = told and {
            "prompt_tokens": told["input_tokens"],
            "completion_tokens": told["output_tokens"],
        }
        return Reply([_choice(whole)], counts, None, num_chunks)

    def complete(self, **params: Any) -> Reply:
        """Ask for a whole completion."""
        prompts = params.pop("prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        result = self._completion(params).generate(prompts)
        choices = [
            _text_choice(one.text, one.generation_info or {})
            for generations in result.generations
            for one in generations
        ]
        return Reply(choices, (result.llm_output or {}).get("token_usage"))

    def complete_stream(self, **params: Any) -> Reply:
        """Stream a completion."""
        prompt = params.pop("prompt")
        params.pop("stream_options", None)
        pieces = [piece for piece in self._completion(params).stream(prompt) if piece]
        return Reply([Choice("".join(pieces))], num_chunks=len(pieces))

    def embed(self, **params: Any) -> tuple[list[Any], None]:
        """Return the vectors; LangChain keeps no usage of them."""
        texts = params.pop("input")
        params.pop("encoding_format", None)
        embeddings = OpenAIEmbeddings(
            model=self.route.embedding_prefix + params.pop("model", "tone"),
            base_url=self.route.url,
            api_key=KEY,
            max_retries=0,
            # Else it sends the token ids of another vocabulary.
            check_embedding_ctx_length=False,
            **params,
        )
        return embeddings.embed_documents([texts] if isinstance(texts, str) else texts), None

    def _model(self, params: dict[str, Any], **more: Any) -> tuple[ChatOpenAI, dict[str, Any], Any]:
        messages = params.pop("messages")
        own = {key: params.pop(key) for key in _FIELDS if key in params}
        model = ChatOpenAI(
            model=self.route.model(params.pop("model", "tone")),
            base_url=self.route.url,
            api_key=KEY,
            max_retries=0,
            timeout=TIMEOUT_S,
            use_responses_api=False,
            **{"stop_sequences" if key == "stop" else key: value for key, value in own.items()},
            **more,
        )
        return model, params, messages

    def _completion(self, params: dict[str, Any]) -> OpenAI:
        return OpenAI(
            model=self.route.model(params.pop("model", "tone")),
            base_url=self.route.url,
            api_key=KEY,
            max_retries=0,
            **params,
        )


def _messages(raw: Sequence[Mapping[str, Any]]) -> list[Any]:
    from langchain_core.messages.utils import convert_to_messages

    return list(convert_to_messages(raw))


def _choice(message: AIMessage) -> Choice:
    told = message.response_metadata
    logprobs = told.get("logprobs") or {}
    calls = {
        i: Call(call["id"] or "", call["name"], json.dumps(call["args"]))
        for i, call in enumerate(message.tool_calls)
    }
    reasoning = message.additional_kwargs.get("reasoning_content", "")
    return Choice(
        str(message.text), reasoning, calls, told.get("finish_reason"), logprobs.get("content")
    )


def _text_choice(text: str, told: Mapping[str, Any]) -> Choice:
    logprobs = told.get("logprobs")
    entries = text_entries(logprobs) if logprobs else None
    return Choice(text, finish=told.get("finish_reason"), logprobs=entries)


class Instructor:
    """`instructor` over `openai.OpenAI`: what it parses goes back into JSON."""

    def __init__(self, route: Route) -> None:
        self.route = route

    @cached_property
    def _api(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.route.url, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)

    def chat(self, **params: Any) -> Reply:
        """Ask for an object, by the mode that the parameters speak of."""
        mode, model, rest = _wish(params)
        client = instructor.from_openai(self._api, mode=mode)
        rest["model"] = self.route.model(rest.pop("model", "tone"))
        parsed, raw = client.create_with_completion(response_model=model, max_retries=0, **rest)
        usage = raw.usage and raw.usage.model_dump()
        finish = raw.choices[0].finish_reason
        assert isinstance(parsed, model)
        choice = Choice(raw.choices[0].message.content or "", finish=finish)
        if mode is instructor.Mode.TOOLS:
            made = raw.choices[0].message.tool_calls[0]
            choice.calls[0] = Call(made.id, made.function.name, made.function.arguments)
        return Reply([choice], usage, raw.system_fingerprint)

    def stream(self, **params: Any) -> Reply:
        """Stream an object that fills up."""
        mode, model, rest = _wish(params)
        client = instructor.from_openai(self._api, mode=mode)
        rest["model"] = self.route.model(rest.pop("model", "tone"))
        rest.pop("stream_options", None)
        objects: Iterable[Any] = client.create_partial(response_model=model, max_retries=0, **rest)
        seen = [one.model_dump_json() for one in objects]
        choice = Choice(seen[-1])
        if mode is instructor.Mode.TOOLS:
            choice.calls[0] = Call("", model.__name__, seen[-1])
        return Reply([choice], num_chunks=len(seen))


def _wish(params: dict[str, Any]) -> tuple[instructor.Mode, type[BaseModel], dict[str, Any]]:
    """Return Instructor's mode and response model for what a feature asks in OpenAI's words."""
    wanted = params.pop("response_format", None)
    tools = params.pop("tools", None)
    params.pop("tool_choice", None)
    if tools is not None:
        function = tools[0]["function"]
        return instructor.Mode.TOOLS, _model_of(function["name"], function["parameters"]), params
    if wanted is None:
        raise NotImplementedError("it asks for objects only")
    if wanted["type"] == "json_schema":
        schema = wanted["json_schema"]
        return instructor.Mode.JSON_SCHEMA, _model_of(schema["name"], schema["schema"]), params
    return instructor.Mode.JSON, create_model("Anything"), params


def _model_of(name: str, schema: Mapping[str, Any]) -> type[BaseModel]:
    """Return a pydantic model with the properties of a flat schema of enums."""
    fields: dict[str, Any] = {
        key: (Literal[tuple(each["enum"])], ...) for key, each in schema["properties"].items()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
