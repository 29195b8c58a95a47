"""Gated mixtures of recurrent states, as a LiteLLM provider.

Names are resolved when they are used: importing this package loads neither torch nor LiteLLM.
`handler` is the instance for a proxy's `custom_provider_map`, `text_stream_retries` one for its
callbacks; `register` is for Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrss_provider.async_engine import AsyncEngine
    from mrss_provider.client import Client
    from mrss_provider.config import EngineConfig
    from mrss_provider.mixture import Mixture
    from mrss_provider.provider import MRSSProvider, register
    from mrss_provider.provider.retries import TextStreamRetries
    from mrss_provider.sampling_params import SamplingParams

    handler: MRSSProvider
    text_stream_retries: TextStreamRetries

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "Client",
    "EngineConfig",
    "Mixture",
    "SamplingParams",
    "__version__",
    "handler",
    "register",
    "text_stream_retries",
]

_HOMES = {
    "AsyncEngine": "mrss_provider.async_engine",
    "Client": "mrss_provider.client",
    "EngineConfig": "mrss_provider.config",
    "Mixture": "mrss_provider.mixture",
    "SamplingParams": "mrss_provider.sampling_params",
    "handler": "mrss_provider.provider",
    "register": "mrss_provider.provider",
    "text_stream_retries": "mrss_provider.provider.retries",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
