"""`mrss doctor`: one line a finding, ending with a sentence that the engine really generated."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.cli.ask import Reply, ask, ignore
from mrss_provider.cli.output import CommandError, answer, answer_json, printable, quiet, size
from mrss_provider.config import Dtype, EngineConfig, misspelt_variables
from mrss_provider.errors import ModelFileError, MRSSError
from mrss_provider.sampling_params import SamplingParams

_MIN_LITELLM = (1, 98)
_MIN_TRITON_CAPABILITY = (8, 0)
_QUESTION = "Hello! How are you?"
_ANSWER_LEN = 32

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What was found about one part, and what to do about it."""

    verdict: Verdict
    part: str
    found: str
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as one line."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.verdict:<4}  {self.part}: {self.found}{remedy}"


def doctor(overrides: Mapping[str, Any], proxy_config: Path | None, as_json: bool) -> bool:
    """Check everything, print each finding as it comes, and return whether nothing failed."""
    failed = False
    with quiet():
        for finding in _examine(overrides, proxy_config):
            failed |= finding.verdict == "FAIL"
            if as_json:
                answer_json(asdict(finding))
            else:
                answer(finding.line())
    return not failed


def _examine(overrides: Mapping[str, Any], proxy_config: Path | None) -> Iterator[Finding]:
    yield _python()
    yield _litellm()
    try:
        config = EngineConfig.from_env(overrides)
    except MRSSError as exc:
        yield Finding("FAIL", "settings", str(exc))
        return
    for variable, meant in misspelt_variables().items():
        yield Finding("warn", "settings", f"{variable} is no setting", f"is it {meant}?")
    yield _guarded("torch", _torch)
    yield _guarded("device", lambda: _device(config))
    yield _guarded("triton", _triton)
    yield _guarded("model", lambda: _model(config))
    yield _guarded("decode", lambda: _decode(config))
    yield _guarded("vocabulary", lambda: _vocabulary(config))
    yield _guarded("template", lambda: _template(config))
    yield from _states(config)
    yield from _proxy(proxy_config)
    yield _guarded("engine", lambda: _sentence(config))


def _guarded(part: str, check: Callable[[], Finding]) -> Finding:
    """Return what `check` finds; an error is a finding too."""
    try:
        return check()
    except (MRSSError, ImportError, OSError, RuntimeError) as exc:
        text = " ".join(str(exc).split()) or type(exc).__name__
        return Finding("FAIL", part, text)


def _python() -> Finding:
    system = f"{platform.system()} {platform.machine()}"
    return Finding("ok", "python", f"{platform.python_version()}, {system}")


def _litellm() -> Finding:
    try:
        version = importlib.metadata.version("litellm")
    except importlib.metadata.PackageNotFoundError:
        return Finding("FAIL", "litellm", "not installed", "pip install 'litellm[proxy]'")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _MIN_LITELLM:
        return Finding("FAIL", "litellm", version, "1.98 or later is needed")
    return Finding("ok", "litellm", version)


def _torch() -> Finding:
    import torch

    return Finding("ok", "torch", torch.__version__)


def _device(config: EngineConfig) -> Finding:
    import torch

    asked = f"asked for by device={config.device}"
    if config.device == "cpu" or not torch.cuda.is_available():
        if config.device == "cuda":
            return Finding(
                "FAIL", "device", f"cuda, {asked}, is not here", "choose --device cpu or auto"
            )
        build = "this torch has no CUDA" if torch.version.cuda is None else "no CUDA device is here"
        why = asked if config.device == "cpu" else build
        return Finding("ok", "device", f"cpu, {why}; {torch.get_num_threads()} threads of torch")
    count = torch.cuda.device_count()
    several = f"the first of {count} (CUDA_VISIBLE_DEVICES says which)"
    here = several if count > 1 else "there is one"
    why = f"{asked}, {here}" if config.device == "cuda" else here
    properties = torch.cuda.get_device_properties(0)
    memory = size(properties.total_memory)
    if torch.version.hip is not None:
        found = f"cuda, {why}: {properties.name} (ROCm {torch.version.hip}, {memory})"
        return Finding("warn", "device", found, "ROCm is not tested; --device cpu is")
    name = f"{properties.name} (sm_{properties.major}{properties.minor}"
    return Finding("ok", "device", f"cuda, {why}: {name}, {memory})")


def _triton() -> Finding:
    import torch

    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        if torch.cuda.is_available():
            return Finding("FAIL", "triton", "not installed", "pip install triton")
        return Finding("ok", "triton", "not installed, and not needed on a CPU")
    if not torch.cuda.is_available():
        return Finding("ok", "triton", f"{version}, not used on a CPU")
    if torch.cuda.get_device_capability() < _MIN_TRITON_CAPABILITY:
        return Finding("warn", "triton", version, "untested on cards before sm_80")
    return Finding("ok", "triton", version)


def _model(config: EngineConfig) -> Finding:
    from mrss_provider.cli.states import read_config
    from mrss_provider.model.checkpoint import find_checkpoint

    shape = read_config(config.model)
    file = find_checkpoint(config.model, ModelFileError)
    weights = f"{shape.dtype} weights, vocabulary of {shape.vocab_size}"
    return Finding("ok", "model", f"{file}: {shape.shape_text()}, {weights}")


def _decode(config: EngineConfig) -> Finding:
    """Say which of the two decode steps this model gets on the device that was chosen."""
    import torch

    from mrss_provider.cli.states import read_config
    from mrss_provider.model.fused_support import (
        check_quantizable,
        fused_obstacle,
        persistent_rows,
    )
    from mrss_provider.model.int8 import pick_int8_form
    from mrss_provider.model.linear import pick_backend, pick_dtype
    from mrss_provider.model.model import check_quantize

    shape = read_config(config.model)
    is_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    dtype = config.dtype
    if dtype == "auto":
        dtype = cast(Dtype, pick_dtype(device, getattr(torch, shape.dtype)))
    check_quantize(config.quantize, config.device, sparse_ffn=config.sparse_ffn)
    quantized = "" if config.quantize == "none" else f", {config.quantize} for the large ones"
    held = f"{dtype} weights{quantized}, {config.state_dtype} states"
    if not is_cuda:
        backend: str = pick_backend(device, dtype, packed=True)
        if quantized:
            backend = f"{backend}, {config.quantize} {pick_int8_form(packed=True)}"
        return Finding("ok", "decode", f"layer by layer on the CPU ({backend}), {held}")
    shape = replace(shape, dtype=dtype, quantize=config.quantize)
    check_quantizable(shape, device)
    obstacle = fused_obstacle(shape, device)
    if obstacle is None:
        rows = persistent_rows(shape, device)
        found = "fused kernels in CUDA graphs"
        found += f", all layers in one for up to {rows} rows" if rows else ""
        return Finding("ok", "decode", f"{found}, {held}")
    found = f"layer by layer, right but slow, {held}: {obstacle}"
    is_wide = dtype == "fp32" and torch.version.hip is None
    return Finding("warn", "decode", found, "choose --dtype bf16 or fp16" if is_wide else "")


def _vocabulary(config: EngineConfig) -> Finding:
    from mrss_provider.tokenizer import Tokenizer, find_vocabulary

    tokenizer = Tokenizer.load(config.tokenizer or find_vocabulary(config.model))
    sample = "Grüße, 世界! 🙂"
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        return Finding("FAIL", "vocabulary", f"{tokenizer.path} does not give a text back")
    return Finding("ok", "vocabulary", str(tokenizer.path))


def _template(config: EngineConfig) -> Finding:
    from mrss_provider.async_engine.card import read_card
    from mrss_provider.async_engine.templates import choose_template

    template, why = choose_template(config.template, read_card(config.model), config.model)
    thinks = "thinks" if template.thought else "does not think"
    calls = "calls tools" if template.tool_call else "has no form for tools"
    return Finding("ok", "template", f"{template.name} ({why}); {thinks}, {calls}")


def _states(config: EngineConfig) -> Iterator[Finding]:
    from mrss_provider.cli.states import read_config
    from mrss_provider.engine.state_library import StateLibrary

    try:
        shape = read_config(config.model)
        library = StateLibrary(config.states, shape, strict=config.strict)
    except MRSSError as exc:
        yield Finding("FAIL", "states", str(exc))
        return
    names = [*library.states, *library.mixtures]
    listed = f": {', '.join(names)}" if names else ""
    counts = f"{len(library.states)} states and {len(library.mixtures)} mixtures"
    yield Finding("ok", "states", f"{counts} in {config.states}{listed}")
    if library.gates:
        yield Finding("ok", "gates", ", ".join(sorted(library.gates)))
    for name, state in library.states.items():
        if state.metadata.base_sha256 not in (None, shape.fingerprint):
            yield Finding(
                "warn", "states", f"{name} was tuned on other weights", "it may do little or harm"
            )
    for problem in library.problems:
        remedy = "mend or remove it; naming it is refused, the rest works"
        yield Finding("warn", "states", f"{problem.name}: {problem.error}", remedy)


def _proxy(path: Path | None) -> Iterator[Finding]:
    from mrss_provider.cli.proxy_config import examine, find_proxy_config

    try:
        found = find_proxy_config(path)
        problems = examine(found)
    except (MRSSError, CommandError, OSError) as exc:
        yield Finding("FAIL", "proxy config", str(exc))
        return
    for problem in problems:
        yield Finding("FAIL", "proxy config", f"{found}: {problem}")
    if not problems:
        yield Finding("ok", "proxy config", str(found))


def _sentence(config: EngineConfig) -> Finding:
    from mrss_provider.async_engine import AsyncEngine

    request = GenerateRequest(
        model="base",
        sampling=SamplingParams(max_tokens=_ANSWER_LEN, seed=0),
        messages=(Message("user", _QUESTION),),
    )
    reply = Reply()

    async def say() -> None:
        engine = AsyncEngine(config)
        try:
            await ask(engine, request, reply, ignore)
        finally:
            await engine.aclose()

    asyncio.run(say())
    text = " ".join(printable(reply.text).split())
    if not text:
        return Finding("FAIL", "engine", "the answer was empty", "try another model file")
    rate = reply.summary().strip("[]")
    return Finding("ok", "engine", f'"{_QUESTION}" - "{text}" ({rate})')
