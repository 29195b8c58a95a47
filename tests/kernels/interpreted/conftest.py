"""Poison fresh memory: an element that a kernel forgets to write must show. Quicken Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import INTERPRETED

if INTERPRETED:
    import quick_interpreter

    quick_interpreter.quicken()


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
