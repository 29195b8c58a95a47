"""The `rwkv` package in fp32 on the CPU: what checkpoints were trained to be read by."""

import importlib.util
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


class PackageModel:
    """One checkpoint in the `rwkv` package."""

    def __init__(self, path, version):
        self._version = version
        options = {} if version == 7 else {"verbose": False}
        with _package_environment(version):
            self._model = _package_class(version)(
                model=os.fspath(path.with_suffix("")), strategy="cpu fp32", **options
            )

    def read(self, token_ids):
        """Return logits [T, V], wkv [L, H, N, N], and both shifts [L, C] after the last token."""
        with _package_environment(self._version):
            logits, state = self._model.forward(list(token_ids), None, full_output=True)
        att, wkv, ffn = (torch.stack([x.float() for x in state[i::3]]) for i in range(3))
        return logits.view(len(token_ids), -1), wkv, att, ffn

    def read_from(self, wkv, token_ids):
        """Return logits [T, V] of an RWKV-7 that begins at `wkv`, one [H, V, K] a layer."""
        with _package_environment(self._version):
            state = self._model.generate_zero_state()
            for i, one in enumerate(wkv):
                state[3 * i + 1] = one.clone()
            logits, _ = self._model.forward(list(token_ids), state, full_output=True)
        return logits.view(len(token_ids), -1)


def _package_class(version):
    """Return the class for a version: the package chooses by environment, on import."""
    name = f"rwkv_model_v{version}"
    if name not in sys.modules:
        folder = Path(next(iter(importlib.util.find_spec("rwkv").submodule_search_locations)))
        spec = importlib.util.spec_from_file_location(name, folder / "model.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].RWKV


@contextmanager
def _package_environment(version):
    """Set what the package reads; hide its warnings (TorchScript is deprecated)."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("RWKV_V7_ON", "1" if version == 7 else "0")
        patch.setenv("RWKV_CUDA_ON", "0")
        patch.setenv("RWKV_JIT_ON", "0")
        yield
