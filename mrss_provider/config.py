"""EngineConfig and ServerConfig: frozen, built once. A leaf.

Order of precedence: flag, then `MRSS_*` environment variable, then the default here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_type_hints

from mrss_provider.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
StateDtype = Literal["fp32", "fp16"]
Quantize = Literal["none", "int8", "int4", "fp8"]
LazyRows = Literal["auto", "on", "off"]
LogFormat = Literal["text", "json"]

_MAX_THREADS = 1024

KEEP_ALIVE_S = 180
"""How long a server keeps a connection that rests, in seconds.

Longer than its clients do, LiteLLM's 120 s among them: who closes first must be the side that asks,
as a connection that closes while a request is on its way fails that request.
"""


def _package_data(name: str) -> Path:
    """Return a folder of bundled data: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    inside = here / "_bundled" / name
    return inside if inside.exists() else here.parent / name


DEMO_MODEL = _package_data("models/demo")
BUNDLED_STATES = _package_data("states")


@dataclass(frozen=True)
class EngineConfig:
    """What the engine loads and how much it may use. Paths may be given as texts.

    Attributes:
        model: checkpoint file (.pth, .safetensors) or folder.
        states: folder of tuned states and `mixtures.toml`.
        models: folder that models may be loaded from while the engine runs; None takes the one that
            the model is in.
        tokenizer: vocabulary file; None looks beside the model, then takes the World vocabulary.
        template: chat template by name; None takes the model's.
        device: "auto" takes CUDA when there is one; CUDA_VISIBLE_DEVICES says which card.
        dtype: of the weights; "auto" keeps the file's on CUDA, picks the fastest exact-enough
            on CPU.
        quantize: "int8" holds the large matrices in 8 bits: half the memory and nearly the same
            answers; on CUDA also "fp8", and "int4" for a quarter of the memory.
        state_dtype: of the recurrent wkv state.
        sparse_ffn: hold a third of the weights twice, so that decoding one row reads only what is
            not multiplied by zero (CUDA, RWKV-7; not done where memory is short).
        threads: CPU threads of the engine; 0 is physical cores - 1, at least 1.
        max_rows: recurrent states held at once (slots).
        max_states: states in one request.
        max_queued: requests that wait for slots before new ones get 429.
        lazy_rows: "on" does not compute rows at each token that weigh nothing; they read what was
            said when they are needed again. "auto" is on for a CPU, where a row costs most.
        reprobe_tokens: with lazy rows, the merge rule `route` computes all rows every so many
            tokens only, and keeps to the row that its gate chose then; 0 is every token.
        prefill_chunk_len: prompt tokens, over all rows, read in a step beside decoding rows.
        prefill_alone_len: prompt tokens that each row reads in a step if none decodes (CUDA).
        prepare_rows: decode steps of up to so many rows are compiled and captured at the start, not
            when they are first met (CUDA).
        max_context_len: prompt plus answer, in tokens.
        cache_bytes: memory for the states of prompts and answers that may be read again; 0 is off.
        cache_device_bytes: the same in a GPU's memory; unset is 5 % of what is free, at most 2 GiB.
        cache_dir: folder in which states stay over a restart, and that do not fit in memory; below
            it each model's weights and dtype have a folder of their own.
        cache_disk_bytes: most that is in the folder of the weights that are served.
        max_sessions: saved conversations that one owner may have.
        session_bytes: memory that the saved conversations of one owner may take.
        sessions_dir: folder in which saved conversations stay over a restart.
        strict: refuse states that were tuned on other weights of the same shape.
        max_state_bytes: larger state files are not loaded while the engine runs.
    """

    model: Path = DEMO_MODEL
    states: Path = BUNDLED_STATES
    models: Path | None = None
    tokenizer: Path | None = None
    template: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = "none"
    state_dtype: StateDtype = "fp32"
    sparse_ffn: bool = False
    threads: int = 0
    max_rows: int = 64
    max_states: int = 16
    max_queued: int = 256
    lazy_rows: LazyRows = "auto"
    reprobe_tokens: int = 0
    prefill_chunk_len: int = 128
    prefill_alone_len: int = 1024
    prepare_rows: int = 8
    max_context_len: int = 131_072
    cache_bytes: int = 1 << 30
    cache_device_bytes: int | None = None
    cache_dir: Path | None = None
    cache_disk_bytes: int = 8 << 30
    max_sessions: int = 64
    session_bytes: int = 1 << 30
    sessions_dir: Path | None = None
    strict: bool = False
    max_state_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        _settle_types(self)
        _check_choices(self, device=Device, dtype=Dtype, quantize=Quantize)
        _check_choices(self, state_dtype=StateDtype, lazy_rows=LazyRows)
        _check_min(self, threads=0, max_rows=1, max_states=1, max_queued=0)
        # With very many, torch ends the process.
        if self.threads > _MAX_THREADS:
            raise ConfigError(
                f"threads must be in [0, {_MAX_THREADS}], got {self.threads}", param="threads"
            )
        _check_min(self, prefill_chunk_len=1, prefill_alone_len=1, max_state_bytes=1024)
        _check_min(self, reprobe_tokens=0, prepare_rows=0, max_context_len=2)
        _check_min(self, cache_bytes=0, cache_disk_bytes=0, max_sessions=0, session_bytes=0)
        if self.cache_device_bytes is not None:
            _check_min(self, cache_device_bytes=0)

    @classmethod
    def from_env(
        cls, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
    ) -> Self:
        """Build from `overrides` (None values are unset), then `MRSS_<FIELD>`, then defaults.

        Raises:
            ConfigError: a malformed value, naming flag or variable.
        """
        return _from_env(cls, overrides or {}, os.environ if env is None else env)


@dataclass(frozen=True)
class ServerConfig:
    """Where and how `mrss serve` listens. Paths may be given as texts.

    Attributes:
        host: address to bind, TCP.
        port: TCP port.
        socket: path of a Unix socket; if set, TCP is not used, but for `loopback_port`.
        loopback_port: beside `socket`, listen on this port of 127.0.0.1 too, which a browser can
            reach; 0 does not.
        idle_exit_s: leave this many seconds after the last lease closed; 0 stays for good.
        drain_s: seconds that running answers get after SIGTERM.
        max_body_bytes: larger request bodies are refused with 413.
        max_session_bytes: so are larger sessions that are imported.
        request_timeout_s: for requests that bring no timeout of their own.
        pacing_ms: with many streams, a stream's tokens are written at most every so many
            milliseconds, several at a time; a few streams never wait. 0 writes each at once.
        keys_file: API keys, made by `mrss keys create`; read again when it changes. None takes
            those of the environment, MRSS_API_KEY and MRSS_ADMIN_KEY.
        no_auth: let everybody ask, without a key, also from other machines; administration then
            still needs an admin key, unless only this machine can reach the server.
        cors_origins: web pages that may read answers, such as "https://a.example,https://b.example";
            None is none.
        max_prompt_len: longest prompt, in tokens; 0 is the engine's limit alone.
        max_answer_len: most tokens that a request may ask for; 0 is the engine's limit alone.
        stall_s: a client that takes nothing of its answer for so many seconds is dropped.
        log_format: "json" is one object a line.
        otel: send a span for each request with OpenTelemetry, where its own variables
            (OTEL_EXPORTER_OTLP_ENDPOINT, ...) say; needs the extra [otel].
        feedback: file that scores and votes are appended to, a JSON object a line; None takes
            mrss/feedback.jsonl in XDG_STATE_HOME, else in ~/.local/state.
    """

    host: str = "127.0.0.1"
    port: int = 9000
    socket: Path | None = None
    loopback_port: int = 0
    idle_exit_s: float = 0.0
    drain_s: float = 30.0
    max_body_bytes: int = 4 << 20
    max_session_bytes: int = 256 << 20
    request_timeout_s: float = 600.0
    pacing_ms: float = 10.0
    keys_file: Path | None = None
    no_auth: bool = False
    cors_origins: str | None = None
    max_prompt_len: int = 0
    max_answer_len: int = 0
    stall_s: float = 60.0
    log_format: LogFormat = "text"
    otel: bool = False
    feedback: Path | None = None

    def __post_init__(self) -> None:
        _settle_types(self)
        if not self.host:
            raise ConfigError(
                "host must be an address or a name, got ''; 0.0.0.0 listens on all of IPv4",
                param="host",
            )
        _check_choices(self, log_format=LogFormat)
        _check_min(self, port=1, idle_exit_s=0, drain_s=0, max_body_bytes=1024, pacing_ms=0)
        _check_min(self, max_session_bytes=0, max_prompt_len=0, max_answer_len=0)
        for name in ("request_timeout_s", "stall_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value!r}", param=name)
        _check_origins(self.cors_origins)
        if self.port > 65_535:
            raise ConfigError(f"port must be in [1, 65535], got {self.port}", param="port")
        if not 0 <= self.loopback_port <= 65_535:
            raise ConfigError(
                f"loopback_port must be in [0, 65535], got {self.loopback_port}",
                param="loopback_port",
            )
        if self.loopback_port and self.socket is None:
            raise ConfigError(
                "loopback_port is for a server on a Unix socket; without socket set host and port",
                param="loopback_port",
            )

    @classmethod
    def from_env(
        cls, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
    ) -> Self:
        """Build as `EngineConfig.from_env` does.

        Raises:
            ConfigError: a malformed value, naming flag or variable.
        """
        return _from_env(cls, overrides or {}, os.environ if env is None else env)


def misspelt_variables(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that nobody reads, with the one that each is probably meant to be.

    Others begin with `MRSS_` too; only what is a letter or two beside one of ours is told.
    """
    names = (field.name for cls in (EngineConfig, ServerConfig) for field in fields(cls))
    ours = {*(f"MRSS_{name.upper()}" for name in names), *_KEY_VARIABLES}
    set_ones = os.environ if env is None else env
    others = [name for name in sorted(set_ones) if name.startswith("MRSS_") and name not in ours]
    near = {name: difflib.get_close_matches(name, ours, n=1, cutoff=0.9) for name in others}
    return {name: found[0] for name, found in near.items() if found}


_Config = TypeVar("_Config")

_KEY_VARIABLES = ("MRSS_API_KEY", "MRSS_ADMIN_KEY")
_ORIGIN = re.compile(r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+")


def _from_env(cls: type[_Config], overrides: Mapping[str, Any], env: Mapping[str, str]) -> _Config:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        variable = f"MRSS_{field.name.upper()}"
        if overrides.get(field.name) is not None:
            values[field.name] = overrides[field.name]
        elif env.get(variable):
            values[field.name] = _parse(env[variable], hints[field.name], variable)
    return cls(**values)


def _parse(text: str, hint: Any, variable: str) -> Any:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    kind = kinds[0]
    try:
        if isinstance(kind, str) or kind is str:
            return text
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as exc:
        raise ConfigError(f"{variable} must be {_kind_name(kind)}, got {text!r}") from exc


def _kind_name(kind: Any) -> str:
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
    }
    return names.get(kind, str(kind))


def _kinds_of(cls: type[object]) -> Mapping[str, tuple[type[Any], ...]]:
    """Return which types each field takes; the fields with a choice of words are left out."""
    hints = get_type_hints(cls)
    kinds = {name: get_args(hint) or (hint,) for name, hint in hints.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind[0], type)}


def _settle_types(config: object) -> None:
    """Make paths of texts, and refuse a value of another type than its field has.

    Raises:
        ConfigError: as said, naming the field.
    """
    for name, kinds in _kinds_of(type(config)).items():
        value = getattr(config, name)
        # No text is no path: `Path` would make the current folder of it.
        if kinds[0] is Path and value and isinstance(value, str | os.PathLike):
            object.__setattr__(config, name, Path(value))
        elif not _is_one_of(value, kinds):
            raise ConfigError(f"{name} must be {_kind_name(kinds[0])}, got {value!r}", param=name)


def _is_one_of(value: object, kinds: tuple[type[Any], ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _check_choices(config: object, **choices: Any) -> None:
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in get_args(allowed):
            which = "; CUDA_VISIBLE_DEVICES says which card" if "cuda:" in str(value) else ""
            raise ConfigError(
                f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}{which}",
                param=name,
            )


def _check_origins(origins: str | None) -> None:
    for origin in map(str.strip, (origins or "").split(",")):
        # A browser names no path, so one that is given would match no page.
        if origin and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"cors_origins must be such as https://a.example, without a path, got {origin!r}",
                param="cors_origins",
            )


def _check_min(config: object, **limits: float) -> None:
    for name, low in limits.items():
        value = getattr(config, name)
        # NaN fails the comparison.
        if not value >= low:
            raise ConfigError(f"{name} must be at least {low:g}, got {value!r}", param=name)
