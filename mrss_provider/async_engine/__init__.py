"""AsyncEngine: a `Backend` in this process, which owns the engine's thread and the text."""

from __future__ import annotations

from mrss_provider.async_engine.async_engine import AsyncEngine

__all__ = ["AsyncEngine"]
