"""The LiteLLM provider `mrss`: a thin client of the engine."""

from __future__ import annotations

from mrss_provider.provider.custom_llm import MRSSProvider
from mrss_provider.provider.registration import handler, register

__all__ = ["MRSSProvider", "handler", "register"]
