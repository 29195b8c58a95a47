"""JSON bodies to `GenerateRequest` and back. Nothing is clamped, ignored or guessed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from mrss_provider.backend import GenerateRequest, MixtureOptions
from mrss_provider.errors import InvalidRequestError
from mrss_provider.openai_schema import prompts as prompts_of
from mrss_provider.openai_schema import values
from mrss_provider.openai_schema.grammars import parse_grammar, write_grammar
from mrss_provider.openai_schema.keys import CHAT_KEYS, COMPLETION_KEYS, SAMPLING_KEYS
from mrss_provider.openai_schema.messages import message_object
from mrss_provider.openai_schema.reasoning import parse_thinking, write_thinking
from mrss_provider.openai_schema.tools import parse_tools, write_tools
from mrss_provider.openai_schema.values import StreamOptions
from mrss_provider.sampling_params import SamplingParams


@dataclass(frozen=True)
class ParsedRequest:
    """A body, understood: one `GenerateRequest` for each prompt (a chat has one)."""

    kind: Literal["chat", "text"]
    requests: tuple[GenerateRequest, ...]
    stream: StreamOptions

    @property
    def request(self) -> GenerateRequest:
        """The only request; for bodies with one prompt."""
        assert len(self.requests) == 1
        return self.requests[0]


def parse_chat_request(body: object) -> ParsedRequest:
    """Parse the body of `POST /v1/chat/completions`.

    Raises:
        InvalidRequestError: naming the key at fault in `param`.
    """
    known = CHAT_KEYS.select(_with_nested_params(body))
    mixture = values.parse_mixture_options(known)
    session, save = values.parse_session(known)
    goes_on = session is not None and known.get("messages") == []
    messages = () if goes_on else values.parse_chat(known)
    tools, tool_choice = parse_tools(known)
    sampling = values.parse_sampling(
        known, values.chat_logprobs(known), values.chat_max_tokens(known)
    )
    request = GenerateRequest(
        model=values.parse_model(known),
        sampling=sampling,
        messages=messages,
        n=values.parse_n(known),
        mixture=mixture,
        timeout_s=values.parse_timeout(known),
        given=values.parse_given(known),
        session=session,
        session_save=save,
        grammar=parse_grammar(known),
        tools=tools,
        tool_choice=tool_choice,
        thinking=parse_thinking(known),
    )
    return ParsedRequest("chat", (request,), values.parse_stream(known))


def parse_completion_request(body: object) -> ParsedRequest:
    """Parse the body of `POST /v1/completions`; one with `messages` is a chat.

    Raises:
        InvalidRequestError: naming the key at fault in `param`.
    """
    merged = _with_nested_params(body)
    if merged.get("messages") is not None:
        return parse_chat_request(merged)
    known = COMPLETION_KEYS.select(merged)
    prompts = prompts_of.parse_prompts(known)
    n = values.parse_n(known)
    stream = values.parse_stream(known)
    sampling = values.parse_sampling(known, values.text_logprobs(known), known.get("max_tokens"))
    mixture = values.parse_mixture_options(known)
    session, save = values.parse_session(known)
    shared: dict[str, Any] = {
        "model": values.parse_model(known),
        "sampling": sampling,
        "n": n,
        "mixture": mixture,
        "timeout_s": values.parse_timeout(known),
        "given": values.parse_given(known),
        "session": session,
        "session_save": save,
        "grammar": parse_grammar(known),
        "echo": values.expect(known.get("echo", False), bool, "echo", "true or false"),
        "best_of": prompts_of.parse_best_of(known, n, stream),
    }
    if session is not None and len(prompts) > 1:
        raise InvalidRequestError("a session goes on with one prompt", param="prompt")
    requests = tuple(GenerateRequest(prompt=prompt, **shared) for prompt in prompts)
    return ParsedRequest("text", requests, stream)


def request_to_body(
    request: GenerateRequest, stream: StreamOptions | None = None
) -> dict[str, Any]:
    """Write the body that parses back to `request`, for the route of its kind.

    A request with `messages` is for `/v1/chat/completions`, one with `prompt` for
    `/v1/completions`.
    """
    body: dict[str, Any] = {"model": request.model}
    if request.messages is not None:
        body["messages"] = [message_object(message) for message in request.messages]
        write_tools(body, request.tools, request.tool_choice)
        write_thinking(body, request.thinking)
    else:
        prompt = request.prompt
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt or ())
    _write_sampling(body, request.sampling, is_chat=request.messages is not None)
    mrss = _write_mixture_options(body, request.mixture)
    if request.sampling.sampling_order is not None:
        mrss["sampling_order"] = request.sampling.sampling_order
    if request.given is not None:
        mrss["given"] = request.given
    write_grammar(body, mrss, request.grammar)
    if request.session is not None:
        mrss["session"] = request.session
    if request.session_save:
        mrss["save"] = True
    if mrss:
        body["mrss"] = mrss
    if request.n != 1:
        body["n"] = request.n
    if request.echo:
        body["echo"] = True
    if request.best_of is not None:
        body["best_of"] = request.best_of
    if request.timeout_s is not None:
        body["timeout"] = request.timeout_s
    if stream is not None and stream.stream:
        body["stream"] = True
        body["stream_options"] = {
            "include_usage": stream.include_usage,
            "include_num_tokens": stream.include_num_tokens,
        }
    return body


def _write_sampling(body: dict[str, Any], sampling: SamplingParams, *, is_chat: bool) -> None:
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if field.name in SAMPLING_KEYS and value != field.default:
            body[field.name] = value
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        body["logit_bias"] = {str(key): bias for key, bias in sampling.logit_bias.items()}
    if sampling.logprobs and not is_chat:
        body["logprobs"] = sampling.top_logprobs
    elif sampling.logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = sampling.top_logprobs


def _write_mixture_options(body: dict[str, Any], options: MixtureOptions) -> dict[str, Any]:
    if options.gating_weights is not None:
        body["mrss_gatingweight"] = list(options.gating_weights)
    mrss: dict[str, Any] = {}
    if options.weights is not None:
        mrss["weights"] = dict(options.weights)
    for name in ("merge", "gate", "cut", "reinject"):
        value = getattr(options, name)
        if value is not None:
            mrss[name] = value
    if options.trace:
        mrss["trace"] = True
    return mrss


def _with_nested_params(body: object) -> dict[str, Any]:
    """Merge RWKV-Infer's nested `params`, which lose against what the top level says."""
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body must be a JSON object, got {values.kind_of(body)}")
    nested = body.get("params")
    if nested is None:
        return {key: value for key, value in body.items() if key != "params"}
    params = values.expect(nested, dict, "params", "an object")
    # Null says nothing, but a null under an unknown name is to be refused.
    silent = {"params", *(key for key in params if body.get(key) is None)}
    return {**params, **{key: value for key, value in body.items() if key not in silent}}
