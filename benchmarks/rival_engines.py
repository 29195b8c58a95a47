"""Adapters: other engines of RWKV-7 as one step, token ids to logits, on CUDA with fp16 weights.

Nothing of theirs is here. Each adapter imports what the reader has: a package, or a checkout, which
compiles its own kernels when it is imported. One process holds one engine: they register ops under
the same names and set torch's global flags.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stepper:
    """A batch of rows, each at the zero state.

    Attributes:
        step: reads one token a row, ids [B] as a list, and returns logits [B, V], the engine's own
            way. Advances the states.
        graph_step: the same from ids that stay as they are, launching kernels only, so that it can
            be captured; None where the engine's step cannot.
    """

    step: Callable[[list[int]], Tensor]
    graph_step: Callable[[], Tensor] | None


class Engine(Protocol):
    """One engine with one model loaded.

    Attributes:
        state_dtype: of its recurrent states.
        max_rows: rows that one step of it can read.
        note: what a reader of the number must know.
    """

    state_dtype: str
    max_rows: int
    note: str

    def start(self, rows: int) -> Stepper:
        """Return a new batch."""
        ...


class RwkvPackage:
    """The `rwkv` package, strategy "cuda fp16". It has no batches."""

    state_dtype = "fp32"
    max_rows = 1
    note = "no batched step"

    def __init__(self, model: Path) -> None:
        rwkv = _import_rwkv()
        self._model: Any = rwkv.RWKV(model=str(model.with_suffix("")), strategy="cuda fp16")

    @staticmethod
    def prepare() -> None:
        """Compile its kernels."""
        _import_rwkv()

    def start(self, rows: int) -> Stepper:
        """Return a new batch of one row."""
        assert rows == 1
        model = self._model
        held = {"state": model.generate_zero_state()}

        def step(ids: list[int]) -> Tensor:
            logits, held["state"] = model.forward(ids[0], held["state"])
            return logits[None]

        fixed = model.generate_zero_state()

        def graph_step() -> Tensor:
            logits, new = model.forward_one_alt(model.z["emb.weight"][0], fixed)
            for old, value in zip(fixed, new, strict=True):
                old.copy_(value)
            return logits[None]

        return Stepper(step, graph_step)


class AlbatrossFast:
    """Albatross from `rwkv7_fast_v3a.py` on: one module a folder, built for CUDA graphs."""

    max_rows = 1024
    note = "its FFN skips zeros at few rows, which random weights have in half of its rows"

    def __init__(self, folder: Path, model: Path, state_dtype: str) -> None:
        self.state_dtype = state_dtype
        module = self._module(folder)
        module.MODEL_PATH = str(model)
        module.WKV_MODE = _wkv_mode(state_dtype)
        # Ids in, as everybody here: by default it looks them up on the host, outside its graph.
        module.EMB_DEVICE = "gpu"
        module.load_extensions(module.WKV_MODE)
        self._model = module.RWKV7()

    @staticmethod
    def file(folder: Path) -> Path | None:
        """Return its module: in `folder`, or in the newest `faster3a_*` of a checkout."""
        found = [folder / "rwkv7_fast_v3a.py", *sorted(folder.glob("faster3a_*/rwkv7_fast_v3a.py"))]
        return next((path for path in [found[0], *found[:0:-1]] if path.is_file()), None)

    @classmethod
    def prepare(cls, folder: Path, state_dtype: str) -> None:
        """Compile its kernels."""
        cls._module(folder).load_extensions(_wkv_mode(state_dtype))

    @classmethod
    def _module(cls, folder: Path) -> Any:
        path = cls.file(folder)
        assert path is not None
        spec = importlib.util.spec_from_file_location("rwkv7_fast_v3a", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Its dataclasses look themselves up there.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def start(self, rows: int) -> Stepper:
        """Return a new batch."""
        model = self._model
        state = model.zero_state(rows)
        fixed = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")

        def step(ids: list[int]) -> Tensor:
            tokens = torch.tensor(ids, device="cuda")[:, None]
            logits: Tensor = model.forward(tokens, state)
            return logits.view(rows, -1)

        def graph_step() -> Tensor:
            logits: Tensor = model.forward(fixed, state)
            return logits

        return Stepper(step, graph_step)


class TorchScriptEngine:
    """`RWKV_x070` of older Albatross (`reference/rwkv7.py`) and of rwkv_lightning.

    One row can be captured where `forward_one` takes an embedding and writes its state in place.
    """

    max_rows = 1024
    note = "more than one row runs without a graph: its step takes ids from the host"

    def __init__(self, folder: Path, module: str, model: Path, about: Any) -> None:
        engine = self._import(folder, module)
        args = types.SimpleNamespace(
            MODEL_NAME=str(model.with_suffix("")),
            vocab_size=about.vocab_size,
            head_size=about.head_size,
            n_layer=about.num_layers,
            n_embd=about.hidden_size,
        )
        self._model = engine.RWKV_x070(args)
        self._is_in_place = hasattr(self._model, "generate_zero_state")
        self.state_dtype = "fp16" if self._is_in_place else "fp32"
        self._about = about

    @classmethod
    def prepare(cls, folder: Path, module: str) -> None:
        """Compile its kernels."""
        cls._import(folder, module)

    @staticmethod
    def _import(folder: Path, module: str) -> Any:
        sys.path.insert(0, str(folder))
        return importlib.import_module(module)

    def start(self, rows: int) -> Stepper:
        """Return a new batch."""
        model = self._model
        if not self._is_in_place:
            held: dict[str, Any] = {"state": self._zero_state(rows)}

            def step(ids: list[int]) -> Tensor:
                tokens = [[token] for token in ids]
                logits, held["state"] = model.forward_batch(tokens, held["state"])
                return logits.view(rows, -1)

            return Stepper(step, None)
        if rows > 1:
            state = model.generate_zero_state(rows)
            return Stepper(
                lambda ids: model.forward_batch([[token] for token in ids], state).view(rows, -1),
                None,
            )
        state, fixed = model.generate_zero_state(0), model.generate_zero_state(0)
        x = model.z["emb.weight"][0].clone()
        return Stepper(
            lambda ids: model.forward(ids[0], state).view(1, -1),
            lambda: model.forward(x, fixed).view(1, -1),
        )

    def _zero_state(self, rows: int) -> list[Tensor]:
        about = self._about
        heads, size = about.num_heads, about.head_size
        state = []
        for _ in range(about.num_layers):
            shift = torch.zeros(rows, about.hidden_size, dtype=torch.half, device="cuda")
            wkv = torch.zeros(rows, heads, size, size, device="cuda")
            state += [shift, wkv, shift.clone()]
        return state


class Fla:
    """`RWKV7ForCausalLM` of flash-linear-attention, as `generate` runs it."""

    state_dtype = "fp32"
    max_rows = 1024
    note = "Python and launches dominate: it is no decode engine"

    def __init__(self, model: Path, about: Any) -> None:
        from fla.models import RWKV7Config, RWKV7ForCausalLM

        w, a, v, g = about.ranks
        config = RWKV7Config(
            hidden_size=about.hidden_size,
            intermediate_size=about.ffn_size,
            num_hidden_layers=about.num_layers,
            head_dim=about.head_size,
            decay_low_rank_dim=w,
            a_low_rank_dim=a,
            v_low_rank_dim=v,
            gate_low_rank_dim=g,
            vocab_size=about.vocab_size,
        )
        with torch.device("meta"):
            self._model: Any = RWKV7ForCausalLM(config)
        official = torch.load(model, map_location="cpu", mmap=True)
        tensors = {fla_name(name): fla_tensor(name, t) for name, t in official.items()}
        shapes = self._model.state_dict()
        half = {k: t.reshape(shapes[k].shape).to("cuda", torch.half) for k, t in tensors.items()}
        self._model.load_state_dict(half, assign=True)
        self._model.eval()

    @staticmethod
    def prepare() -> None:
        """Nothing is compiled beforehand."""

    def start(self, rows: int) -> Stepper:
        """Return a new batch."""
        held: dict[str, Any] = {"cache": None}

        def step(ids: list[int]) -> Tensor:
            tokens = torch.tensor(ids, device="cuda")[:, None]
            out = self._model(input_ids=tokens, past_key_values=held["cache"], use_cache=True)
            held["cache"] = out.past_key_values
            logits: Tensor = out.logits[:, -1]
            return logits

        return Stepper(step, None)


_FLA_NAMES = (
    (r"^emb\.", "model.embeddings."),
    (r"^head\.", "lm_head."),
    (r"^ln_out\.", "model.norm."),
    (r"^blocks\.", "model.layers."),
    (r"\.ln0\.", ".pre_norm."),
    (r"\.ln1\.", ".attn_norm."),
    (r"\.ln2\.", ".ffn_norm."),
    (r"\.att\.ln_x\.", ".attn.g_norm."),
    (r"\.att\.receptance\.", ".attn.r_proj."),
    (r"\.att\.key\.", ".attn.k_proj."),
    (r"\.att\.value\.", ".attn.v_proj."),
    (r"\.att\.output\.", ".attn.o_proj."),
    (r"\.att\.([wavg])0$", r".attn.\1_lora.lora.2.bias"),
    (r"\.att\.([wavg])1$", r".attn.\1_lora.lora.0.weight"),
    (r"\.att\.([wavg])2$", r".attn.\1_lora.lora.2.weight"),
    (r"\.att\.", ".attn."),
)


def fla_name(name: str) -> str:
    """Return fla's name of an official one."""
    for pattern, replacement in _FLA_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def fla_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return an official tensor in fla's layout: its LoRAs are [out, in]."""
    return tensor.t() if re.search(r"att\.[wavg][12]$", name) else tensor


@dataclass(frozen=True)
class Rival:
    """What the command line names: `rwkv`, `fla`, `albatross:PATH`, `rwkv_lightning:PATH`."""

    kind: str
    folder: Path | None

    @classmethod
    def parse(cls, text: str) -> Rival:
        """Read `kind` or `kind:path`; exits with one sentence on anything else."""
        kind, _, path = text.partition(":")
        needs_folder = {"rwkv": False, "fla": False, "albatross": True, "rwkv_lightning": True}
        if needs_folder.get(kind) is not bool(path):
            sys.exit(
                f"--rival must be rwkv, fla, albatross:PATH or rwkv_lightning:PATH, got {text!r}"
            )
        folder = Path(path).resolve() if path else None
        if folder is not None and not folder.is_dir():
            sys.exit(f"--rival {kind} needs a checkout, and {folder} is no folder")
        return cls(kind, folder)

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return f"{self.kind}:{self.folder}" if self.folder else self.kind

    def version(self) -> str:
        """Return its commit, or the package's version."""
        if self.folder is None:
            name = {"rwkv": "rwkv", "fla": "flash-linear-attention"}[self.kind]
            return importlib.metadata.version(name)
        # A folder without a history of its own may say where it is from.
        if (self.folder / "COMMIT").is_file():
            return (self.folder / "COMMIT").read_text().strip()
        command = ["git", "-C", str(self.folder), "rev-parse", "--show-toplevel", "HEAD"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        top, _, commit = run.stdout.strip().partition("\n")
        ours = Path(__file__).resolve().parent.parent
        return commit[:7] if run.returncode == 0 and Path(top) != ours else "unknown"

    def prepare(self, state_dtype: str) -> None:
        """Compile its kernels, without a model."""
        if self.folder is None:
            (RwkvPackage if self.kind == "rwkv" else Fla).prepare()
        elif self.kind == "albatross" and AlbatrossFast.file(self.folder):
            AlbatrossFast.prepare(self.folder, state_dtype)
        else:
            TorchScriptEngine.prepare(self.folder, self._module())

    def load(self, model: Path, about: Any, state_dtype: str) -> Engine:
        """Load a `.pth` of shape `about` (a `models.Shape`)."""
        if self.folder is None:
            return RwkvPackage(model) if self.kind == "rwkv" else Fla(model, about)
        if self.kind == "albatross" and AlbatrossFast.file(self.folder):
            return AlbatrossFast(self.folder, model, state_dtype)
        return TorchScriptEngine(self.folder, self._module(), model, about)

    def _module(self) -> str:
        return "reference.rwkv7" if self.kind == "albatross" else "infer.rwkv_batch.rwkv7"


def _wkv_mode(state_dtype: str) -> str:
    return "fp16" if state_dtype == "fp16" else "fp32io16"


def _import_rwkv() -> Any:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "1"}
    return importlib.import_module("rwkv.model")
