"""EngineConfig and ServerConfig: frozen, built once. A leaf.

Order of precedence: flag, then `MRSS_*` environment variable, then the default here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_type_hints

from mrss_provider.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
StateDtype = Literal["fp32", "fp16"]


def _package_data(name: str) -> Path:
    """Return a folder of bundled data: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    inside = here / "_bundled" / name
    return inside if inside.exists() else here.parent / name


DEMO_MODEL = _package_data("models/demo")
BUNDLED_STATES = _package_data("states")


@dataclass(frozen=True)
class EngineConfig:
    """What the engine loads and how much it may use.

    Attributes:
        model: checkpoint file (.pth, .safetensors) or folder.
        states: folder of tuned states and `mixtures.toml`.
        tokenizer: vocabulary file; None looks beside the model, then takes the World vocabulary.
        template: chat template by name; None takes the model's.
        device: "auto" takes CUDA when there is one; CUDA_VISIBLE_DEVICES says which card.
        dtype: of the weights; "auto" keeps the file's on CUDA, picks the fastest exact-enough
            on CPU.
        state_dtype: of the recurrent wkv state.
        sparse_ffn: hold a third of the weights twice, so that decoding few rows reads only what is
            not multiplied by zero (CUDA, RWKV-7; not done where memory is short).
        threads: CPU threads of the engine; 0 is physical cores - 1, at least 1.
        max_rows: recurrent states held at once (slots).
        max_states: states in one request.
        max_queued: requests that wait for slots before new ones get 429.
        prefill_chunk_len: prompt tokens, over all rows, read in a step beside decoding rows.
        prefill_alone_len: prompt tokens that each row reads in a step if none decodes (CUDA).
        prepare_rows: decode steps of up to so many rows are compiled and captured at the start, not
            when they are first met (CUDA).
        max_context_len: prompt plus answer, in tokens.
        strict: refuse states that were tuned on other weights of the same shape.
    """

    model: Path = DEMO_MODEL
    states: Path = BUNDLED_STATES
    tokenizer: Path | None = None
    template: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    state_dtype: StateDtype = "fp32"
    sparse_ffn: bool = False
    threads: int = 0
    max_rows: int = 64
    max_states: int = 16
    max_queued: int = 256
    prefill_chunk_len: int = 128
    prefill_alone_len: int = 1024
    prepare_rows: int = 8
    max_context_len: int = 131_072
    strict: bool = False

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_min(self, threads=0, max_rows=1, max_states=1, max_queued=0)
        _check_min(self, prefill_chunk_len=1, prefill_alone_len=1)
        _check_min(self, prepare_rows=0, max_context_len=2)

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
    """Where and how `mrss serve` listens.

    Attributes:
        host: address to bind, TCP.
        port: TCP port.
        socket: path of a Unix socket; if set, TCP is not used.
        idle_exit_s: leave this many seconds after the last lease closed; 0 stays for good.
        drain_s: seconds that running answers get after SIGTERM.
        max_body_bytes: larger request bodies are refused with 413.
        request_timeout_s: for requests that bring no timeout of their own.
    """

    host: str = "127.0.0.1"
    port: int = 9000
    socket: Path | None = None
    idle_exit_s: float = 0.0
    drain_s: float = 30.0
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _check_min(self, port=1, idle_exit_s=0, drain_s=0, max_body_bytes=1024)
        if not self.request_timeout_s > 0:
            raise ConfigError(
                f"request_timeout_s must be above 0, got {self.request_timeout_s!r}",
                param="request_timeout_s",
            )
        if self.port > 65_535:
            raise ConfigError(f"port must be in [1, 65535], got {self.port}", param="port")

    @classmethod
    def from_env(
        cls, overrides: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None
    ) -> Self:
        """Build as `EngineConfig.from_env` does.

        Raises:
            ConfigError: a malformed value, naming flag or variable.
        """
        return _from_env(cls, overrides or {}, os.environ if env is None else env)


_Config = TypeVar("_Config")


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
    names = {int: "an integer", float: "a number", bool: "true or false", Path: "a path"}
    return names.get(kind, str(kind))


def _check_choices(config: EngineConfig) -> None:
    for name, choices in (("device", Device), ("dtype", Dtype), ("state_dtype", StateDtype)):
        value = getattr(config, name)
        if value not in get_args(choices):
            which = "; CUDA_VISIBLE_DEVICES says which card" if "cuda:" in str(value) else ""
            raise ConfigError(
                f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}{which}",
                param=name,
            )


def _check_min(config: object, **limits: float) -> None:
    for name, low in limits.items():
        value = getattr(config, name)
        # NaN fails the comparison.
        if not value >= low:
            raise ConfigError(f"{name} must be at least {low:g}, got {value!r}", param=name)
