"""A random model served by `mrss serve`, and the loads that are put on it.

What `serve_gpu.py` and its child processes share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import write_checkpoint, write_states
from random_models import SHAPES

from mrss_provider.backend import GenerateRequest, MixtureOptions
from mrss_provider.client import Client
from mrss_provider.config import EngineConfig
from mrss_provider.errors import MRSSError
from mrss_provider.sampling_params import SamplingParams

MAX_STATES = 8
# For a model to be loaded, and for one load to be run.
LOAD_S = 240.0
PART_S = 120.0


@dataclass(frozen=True)
class Load:
    """Requests at once, and the states of each one's mixture."""

    num_requests: int
    num_states: int = 1

    @classmethod
    def parse(cls, text: str) -> Load:
        """Read `32` or `1x4`."""
        requests, _, states = text.partition("x")
        try:
            found = cls(int(requests), int(states or 1))
        except ValueError:
            found = cls(0)
        if found.num_requests < 1 or not 1 <= found.num_states <= MAX_STATES:
            raise argparse.ArgumentTypeError(
                f"must be REQUESTS or REQUESTSxSTATES, at most {MAX_STATES} states, got {text!r}"
            )
        return found

    @property
    def rows(self) -> int:
        """Recurrent states held, under the linear merge and the fixed gate (no base)."""
        return self.num_requests * self.num_states

    @property
    def name(self) -> str:
        """The mixture's name."""
        return "+".join(f"s{k}" for k in range(self.num_states)) if self.num_states > 1 else "base"

    @property
    def mixture(self) -> MixtureOptions:
        """Its merge and gate."""
        if self.num_states == 1:
            return MixtureOptions()
        return MixtureOptions(merge="linear", gate="fixed")

    def request(self, index: int, num_tokens: int, top_p: float) -> GenerateRequest:
        """Return one of its requests."""
        sampling = SamplingParams(
            temperature=1.0, top_p=top_p, seed=index, max_tokens=num_tokens, ignore_eos=True
        )
        return GenerateRequest(
            self.name, sampling, prompt=(33, 44, 55, 66), mixture=self.mixture, timeout_s=PART_S
        )


@dataclass(frozen=True)
class Files:
    """The folders of one served model."""

    model: Path
    states: Path

    def config(self, args: argparse.Namespace, max_rows: int) -> EngineConfig:
        """Return what the engine loads."""
        return EngineConfig(
            model=self.model,
            states=self.states,
            device="cuda",
            dtype=args.dtype,
            state_dtype=args.state_dtype,
            max_rows=max_rows,
            # Half of what random weights give is zero; trained ones give far more.
            sparse_ffn=False,
        )


@contextlib.contextmanager
def written(name: str) -> Iterator[Files]:
    """Write a model and states to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mrss") as folder:
        files = Files(Path(folder) / "model", Path(folder) / "states")
        files.model.mkdir()
        write_checkpoint(files.model / f"{name}.pth", SHAPES[name])
        write_states(files.states, SHAPES[name], MAX_STATES)
        torch.cuda.empty_cache()
        yield files


@contextlib.contextmanager
def served(config: EngineConfig) -> Iterator[str]:
    """Run `mrss serve`; yields its address once it is ready."""
    with tempfile.TemporaryDirectory(prefix="mrss") as folder:
        socket = Path(folder) / "s"
        options = {
            "--model": config.model,
            "--states": config.states,
            "--device": config.device,
            "--dtype": config.dtype,
            "--state-dtype": config.state_dtype,
            "--max-rows": config.max_rows,
            "--socket": socket,
        }
        command = [sys.executable, "-m", "mrss_provider.cli", "serve"]
        command += [str(part) for option in options.items() for part in option]
        command += ["--sparse-ffn" if config.sparse_ffn else "--no-sparse-ffn"]
        log = Path(folder) / "log"
        with log.open("w") as file:
            server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            asyncio.run(_wait_ready(f"unix://{socket}", server, log))
            yield f"unix://{socket}"
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()
            server.wait()


async def _wait_ready(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LOAD_S
    while True:
        with contextlib.suppress(MRSSError):
            if await Client(address).probe() == "ready":
                return
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the server did not get ready:\n{log.read_text()[-3000:]}")
        await asyncio.sleep(0.2)
