"""Every key a request may have, of three kinds: honoured, accepted as harmless, refused.

An accepted key changes nothing that this engine computes, or asks for a thing it does not keep.
A refused key has neutral values (they ask for nothing) that pass; every other value is a 400
with the reason. A key in no table is a 400 that names what it is called here, or the nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mrss_provider.errors import InvalidRequestError


@dataclass(frozen=True)
class Refusal:
    """Why a key is refused, and the values that ask for nothing and so pass."""

    reason: str
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True)
class KeyTable:
    """The keys of one JSON object.

    Attributes:
        where: its path in the body, "" at the top.
        honoured, accepted, refused: as the module says.
        hints: what to do about a key that is unknown here and known elsewhere.
    """

    where: str
    honoured: frozenset[str]
    accepted: frozenset[str]
    refused: Mapping[str, Refusal]
    hints: Mapping[str, str] = field(default_factory=dict)

    def select(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the honoured entries of `body`; null stands for absent.

        Raises:
            InvalidRequestError: a key that is refused or unknown.
        """
        fields: dict[str, Any] = {}
        for key, value in body.items():
            if key in self.honoured:
                if value is not None:
                    fields[key] = value
            elif key in self.refused:
                self._check_neutral(key, value)
            elif key not in self.accepted:
                raise self._unknown(key)
        return fields

    def _check_neutral(self, key: str, value: Any) -> None:
        refusal = self.refused[key]
        if value is None or any(
            type(value) is type(neutral) and value == neutral for neutral in refusal.neutral
        ):
            return
        path = self.path(key)
        raise InvalidRequestError(f"{path} is refused: {refusal.reason}", param=path)

    def _unknown(self, key: str) -> InvalidRequestError:
        shown = key if len(key) <= 64 else key[:61] + "..."
        # JSON can spell half of a surrogate pair, the answer could not.
        shown = shown.encode(errors="backslashreplace").decode()
        path = self.path(shown)
        hint = self.hints.get(key) or self._nearest(shown)
        return InvalidRequestError(f"{path!r} is no parameter here; {hint}", param=path)

    def _nearest(self, key: str) -> str:
        near = difflib.get_close_matches(key, sorted(self.honoured), n=1, cutoff=0.6)
        return f"did you mean {self.path(near[0])!r}?" if near else "leave it out"

    def path(self, key: str) -> str:
        """Return `key` as the user would write it from the top of the body."""
        return f"{self.where}.{key}" if self.where else key


# Passed to SamplingParams under the same name.
SAMPLING_KEYS = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "penalty_decay",
        "seed",
        "ignore_eos",
        "max_tokens",
    }
)

_HONOURED = SAMPLING_KEYS | {
    "model",
    "stop",
    "logit_bias",
    "n",
    "logprobs",
    "response_format",
    "stream",
    "stream_options",
    "timeout",
    "mrss",
    "mrss_gatingweight",
}

# They name the caller, or where an answer is kept or routed; LiteLLM's own retry count.
ACCEPTED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "max_retries",
    }
)

MRSS_KEYS = KeyTable(
    where="mrss",
    honoured=frozenset(
        {
            "weights",
            "merge",
            "gate",
            "cut",
            "reinject",
            "sampling_order",
            "trace",
            "given",
            "session",
            "save",
            "regex",
            "grammar",
        }
    ),
    accepted=frozenset(),
    refused={},
)

_CONTINUED = "leave it out: a last message of the assistant is always continued"
_THINKING = "use 'reasoning_effort'"

# What other servers call it.
_HINTS = {
    **{
        prefix + key: f"did you mean 'mrss.{key}'?"
        for prefix in ("", "mrss_", "mrss.")
        for key in MRSS_KEYS.honoured
    },
    "guided_choice": "use 'mrss.regex'",
    "guided_grammar": "use 'mrss.grammar'",
    "guided_json": "use 'response_format'",
    "guided_regex": "use 'mrss.regex'",
    "json_schema": "use 'response_format'",
    "max_new_tokens": "use 'max_tokens'",
    "max_output_tokens": "use 'max_tokens'",
    "min_tokens": "leave it out",
    "n_predict": "use 'max_tokens'",
    "num_predict": "use 'max_tokens'",
    "stop_token_ids": "use 'stop', which takes texts",
    "structured_outputs": "use 'response_format', 'mrss.regex' or 'mrss.grammar'",
}
_CHAT_HINTS = {
    **_HINTS,
    "add_generation_prompt": _CONTINUED,
    "chat_template_kwargs": _THINKING,
    "continue_final_message": _CONTINUED,
    "enable_thinking": _THINKING,
    "reasoning": _THINKING,
    "system": "send a message of the role 'system'",
}

_NO_FUNCTIONS = "it was replaced by {}: use tools"
_CHATS_CALL = "only chats call tools: send messages to /v1/chat/completions"

CHAT_KEYS = KeyTable(
    where="",
    honoured=frozenset(
        _HONOURED
        | {"messages", "max_completion_tokens", "top_logprobs"}
        | {"tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "thinking"}
    ),
    accepted=ACCEPTED | {"prediction"},
    refused={
        "functions": Refusal(_NO_FUNCTIONS.format("tools"), neutral=([],)),
        "function_call": Refusal(_NO_FUNCTIONS.format("tool_choice"), neutral=("none",)),
        "modalities": Refusal('only ["text"] is produced', neutral=(["text"],)),
        "audio": Refusal("only text is produced"),
        "verbosity": Refusal("these models have no verbosity levels", neutral=("medium",)),
        "web_search_options": Refusal("this engine does not search the web"),
        "moderation": Refusal("this engine does not moderate"),
        "echo": Refusal("a chat's prompt is not repeated", neutral=(False,)),
        "suffix": Refusal("a recurrent model only writes forward", neutral=("",)),
        "best_of": Refusal("ask for n answers and choose", neutral=(1,)),
        "prompt": Refusal("a chat takes messages; send a prompt to /v1/completions"),
        "extra_body": Refusal("put its entries at the top of the body", neutral=({},)),
    },
    hints=_CHAT_HINTS,
)

COMPLETION_KEYS = KeyTable(
    where="",
    honoured=frozenset(_HONOURED | {"prompt", "best_of", "echo"}),
    accepted=ACCEPTED,
    refused={
        "suffix": Refusal("a recurrent model only writes forward", neutral=("",)),
        "extra_body": Refusal("put its entries at the top of the body", neutral=({},)),
        "tools": Refusal(_CHATS_CALL, neutral=([],)),
        "tool_choice": Refusal(_CHATS_CALL, neutral=("none",)),
        **{key: CHAT_KEYS.refused[key] for key in ("functions", "function_call")},
    },
    hints=_HINTS,
)

STREAM_KEYS = KeyTable(
    where="stream_options",
    honoured=frozenset({"include_usage", "include_num_tokens"}),
    # Padding against traffic analysis; our chunks have none.
    accepted=frozenset({"include_obfuscation"}),
    refused={},
)

FORMAT_KEYS = KeyTable(
    where="response_format",
    honoured=frozenset({"type", "json_schema"}),
    accepted=frozenset(),
    refused={},
)

JSON_SCHEMA_KEYS = KeyTable(
    where="response_format.json_schema",
    honoured=frozenset({"name", "description", "schema", "strict"}),
    accepted=frozenset(),
    refused={},
)

# Where a reader may begin in a cache: ours finds that out by itself.
CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})

_NO_REPLAY = "it was replaced by tool_calls; send that"


def message_keys(position: int) -> KeyTable:
    """Return the table for `messages[position]`.

    The accepted keys are what clients send back when they replay an answer (a thought is not told
    to the model again), hints for a cache, and `name`, which the templates have no place for.
    """
    return KeyTable(
        where=f"messages[{position}]",
        honoured=_MESSAGE_HONOURED,
        accepted=_MESSAGE_ACCEPTED,
        refused=_MESSAGE_REFUSED,
        hints={"prefix": _CONTINUED, "partial": _CONTINUED},
    )


_MESSAGE_HONOURED = frozenset({"role", "content", "tool_calls", "tool_call_id"})
_MESSAGE_ACCEPTED = CACHE_HINTS | {
    "name",
    "provider_specific_fields",
    "reasoning_content",
    "thinking_blocks",
    "annotations",
}
_MESSAGE_REFUSED = {
    "function_call": Refusal(_NO_REPLAY),
    "audio": Refusal("only text is read"),
    "images": Refusal("only text is read", neutral=([],)),
    "refusal": Refusal("a refused turn cannot be continued", neutral=("",)),
}
