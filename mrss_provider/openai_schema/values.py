"""The values of one request body, each checked and turned into the leaves' types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from mrss_provider.backend import Message, MixtureOptions, Reinject
from mrss_provider.errors import ContextLengthError, InvalidRequestError
from mrss_provider.mixture import Kind, check_weight, parse_method
from mrss_provider.openai_schema.checks import check_text as _check_text
from mrss_provider.openai_schema.checks import expect as expect
from mrss_provider.openai_schema.checks import kind_of as kind_of
from mrss_provider.openai_schema.checks import shown as _shown
from mrss_provider.openai_schema.keys import MRSS_KEYS, SAMPLING_KEYS, STREAM_KEYS
from mrss_provider.openai_schema.messages import MAX_MESSAGES as MAX_MESSAGES
from mrss_provider.openai_schema.messages import ROLES as ROLES
from mrss_provider.openai_schema.messages import parse_messages, texts_of
from mrss_provider.sampling_params import MAX_TOKENS, MAX_TOP_LOGPROBS, SamplingParams

MAX_N = 16
MAX_PROMPTS = 128
# Far above any context length in use, far below what would hurt to tokenise.
MAX_CHARS = 2_000_000
# 30 years: event loops and clocks count so far.
MAX_TIMEOUT_S = 1e9
MODEL_PREFIX = "mrss/"
MAX_MODEL_CHARS = 1024


@dataclass(frozen=True)
class StreamOptions:
    """How the answer travels.

    Attributes:
        stream: as server-sent events.
        include_usage: end the stream with a usage chunk.
        include_num_tokens: tell the number of sampled tokens in each chunk (`num_tokens` beside
            the choice's `delta` or `text`), as our own client asks.
    """

    stream: bool = False
    include_usage: bool = False
    include_num_tokens: bool = False


def parse_model(known: Mapping[str, Any]) -> str:
    model = expect(known.get("model"), str, "model", "a name such as 'knowledge+tone'")
    model = _check_text(model, "model").removeprefix(MODEL_PREFIX)
    if not 0 < len(model) <= MAX_MODEL_CHARS:
        raise InvalidRequestError(
            f"model must have 1 to {MAX_MODEL_CHARS} characters, got {len(model)}", param="model"
        )
    return model


def parse_chat(known: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = parse_messages(known)
    _check_total_chars(texts_of(messages), "messages")
    return messages


def parse_sampling(
    known: Mapping[str, Any], logprobs: dict[str, Any], max_tokens: object
) -> SamplingParams:
    values = {key: known[key] for key in SAMPLING_KEYS if key in known}
    mrss = known.get("mrss")
    order = mrss.get("sampling_order") if isinstance(mrss, dict) else None
    return SamplingParams(
        **{**values, "max_tokens": max_tokens},
        **logprobs,
        stop=_parse_stop(known),
        logit_bias=_parse_logit_bias(known),
        sampling_order=order,
    )


def chat_max_tokens(known: Mapping[str, Any]) -> object:
    old, new = known.get("max_tokens"), known.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"max_tokens and max_completion_tokens must be equal when both are given, got {old!r} "
            f"and {new!r}",
            param="max_completion_tokens",
        )
    name, value = ("max_tokens", old) if new is None else ("max_completion_tokens", new)
    if value is not None and (type(value) is not int or not 1 <= value <= MAX_TOKENS):
        raise InvalidRequestError(
            f"{name} must be an integer in [1, {MAX_TOKENS}], got {_shown(value)}", param=name
        )
    return value


def chat_logprobs(known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: known[key] for key in ("logprobs", "top_logprobs") if key in known}


def text_logprobs(known: Mapping[str, Any]) -> dict[str, Any]:
    if "logprobs" not in known:
        return {}
    value = known["logprobs"]
    if type(value) is not int or not 0 <= value <= MAX_TOP_LOGPROBS:
        raise InvalidRequestError(
            f"logprobs must be an integer in [0, {MAX_TOP_LOGPROBS}] here, got {_shown(value)}",
            param="logprobs",
        )
    return {"logprobs": True, "top_logprobs": value}


def _parse_stop(known: Mapping[str, Any]) -> tuple[str, ...]:
    stop = known.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(_as_list(stop, "stop"))
    return tuple(
        _check_text(expect(item, str, "stop", "a string or a list of strings"), "stop")
        for item in stops
    )


def _parse_logit_bias(known: Mapping[str, Any]) -> dict[int, float]:
    raw = expect(known.get("logit_bias", {}), dict, "logit_bias", "an object: token id -> bias")
    parsed: dict[int, float] = {}
    for key, bias in raw.items():
        text = key if isinstance(key, str) else _shown(key)
        # Ids have at most 10 digits; a longer run would only be slow to convert.
        if not (text.isascii() and text.isdigit() and len(text) <= 10):
            raise InvalidRequestError(
                f"logit_bias keys are token ids, got {_shown(key)}", param="logit_bias"
            )
        if int(text) in parsed:
            raise InvalidRequestError(
                f"logit_bias has token {int(text)} twice; give it one bias", param="logit_bias"
            )
        parsed[int(text)] = bias
    return parsed


def parse_n(known: Mapping[str, Any]) -> int:
    n = known.get("n", 1)
    if type(n) is not int or not 1 <= n <= MAX_N:
        raise InvalidRequestError(
            f"n must be an integer in [1, {MAX_N}], got {_shown(n)}", param="n"
        )
    return n


def parse_timeout(known: Mapping[str, Any]) -> float | None:
    timeout = known.get("timeout")
    if timeout is None:
        return None
    # NaN fails the comparison, and so do integers too large for a float.
    if type(timeout) not in (int, float) or not 0 < timeout <= MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"timeout must be a number of seconds above 0 and up to {MAX_TIMEOUT_S:g}, got "
            f"{_shown(timeout)}",
            param="timeout",
        )
    return float(timeout)


def parse_stream(known: Mapping[str, Any]) -> StreamOptions:
    stream = expect(known.get("stream", False), bool, "stream", "true or false")
    raw = expect(known.get("stream_options", {}), dict, "stream_options", "an object")
    options = STREAM_KEYS.select(raw)
    for key, value in options.items():
        expect(value, bool, STREAM_KEYS.path(key), "true or false")
    return StreamOptions(
        stream=stream,
        include_usage=options.get("include_usage", False),
        include_num_tokens=options.get("include_num_tokens", False),
    )


def parse_mixture_options(known: Mapping[str, Any]) -> MixtureOptions:
    mrss = MRSS_KEYS.select(expect(known.get("mrss", {}), dict, "mrss", "an object"))
    gating = known.get("mrss_gatingweight")
    if gating is not None and "weights" in mrss:
        raise InvalidRequestError(
            "give mrss.weights or mrss_gatingweight, not both", param="mrss_gatingweight"
        )
    return MixtureOptions(
        weights=_parse_weights(mrss.get("weights")),
        merge=_parse_method(mrss.get("merge"), "merge"),
        gate=_parse_method(mrss.get("gate"), "gate"),
        cut=_parse_cut(mrss.get("cut")),
        gating_weights=None if gating is None else _parse_gating_weights(gating),
        trace=expect(mrss.get("trace", False), bool, "mrss.trace", "true or false"),
        reinject=_parse_reinject(mrss.get("reinject")),
    )


def parse_given(known: Mapping[str, Any]) -> str | None:
    given = known.get("mrss", {}).get("given")
    if given is None:
        return None
    text = _check_text(expect(given, str, "mrss.given", "a text"), "mrss.given")
    _check_total_chars([text], "mrss.given")
    return text


def parse_session(known: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return the session that a request goes on with, and whether the answer is saved to it."""
    mrss = known.get("mrss", {})
    session, save = mrss.get("session"), mrss.get("save")
    if session is not None:
        session = _check_text(expect(session, str, "mrss.session", "a text"), "mrss.session")
    return session, save is not None and expect(save, bool, "mrss.save", "true or false")


def _parse_weights(raw: object) -> dict[str, float] | None:
    if raw is None:
        return None
    weights = expect(raw, dict, "mrss.weights", "an object: state name -> weight")
    return {
        _check_text(name, "mrss.weights"): check_weight(value, "mrss.weights")
        for name, value in weights.items()
    }


def _parse_gating_weights(raw: object) -> tuple[float, ...]:
    """Read RWKV-Infer's list, whose numbers may be strings."""
    where = "mrss_gatingweight"
    weights = []
    for item in _as_list(raw, where):
        value: object = item
        if isinstance(item, str):
            try:
                value = float(item)
            except ValueError as exc:
                raise InvalidRequestError(
                    f"{where}: a weight is a number, got {_shown(item)}", param=where
                ) from exc
        weights.append(check_weight(value, where))
    return tuple(weights)


def _parse_method(value: object, kind: Kind) -> str | None:
    return None if value is None else parse_method(value, kind, f"mrss.{kind}").text


def _parse_cut(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= cast(float, value) < 1:
        raise InvalidRequestError(
            f"mrss.cut must be in [0, 1), got {_shown(value)}", param="mrss.cut"
        )
    # 0 has no sign, so that it has one fingerprint.
    return float(cast(float, value)) + 0.0


def _parse_reinject(value: object) -> Reinject | None:
    if value is not None and value not in get_args(Reinject):
        raise InvalidRequestError(
            f"mrss.reinject must be one of {', '.join(get_args(Reinject))}, got {_shown(value)}",
            param="mrss.reinject",
        )
    return cast(Reinject | None, value)


def _check_total_chars(texts: Any, where: str) -> None:
    total = sum(len(text) for text in texts)
    if total > MAX_CHARS:
        raise ContextLengthError(
            f"{where} may hold {MAX_CHARS} characters in all, got {total}; shorten it", param=where
        )


def _as_list(value: object, where: str) -> Sequence[object]:
    if isinstance(value, list | tuple):
        return value
    raise InvalidRequestError(f"{where} must be a list, got {kind_of(value)}", param=where)
