"""Every feature, in the order of the table."""

from __future__ import annotations

from importlib import import_module

from conformance.feature import FEATURES, Feature

__all__ = ["FEATURES", "Feature"]

# Each enters its features as it is loaded; `other_routes` loads `structured`.
for _module in ("chats", "structured", "texts", "other_routes"):
    import_module(f"conformance.{_module}")
