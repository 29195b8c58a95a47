"""Every feature, in the order of the table."""

from __future__ import annotations

# Each enters its features as it is loaded.
from conformance import chats, other_routes, structured, texts  # noqa: F401
from conformance.feature import FEATURES, Feature

__all__ = ["FEATURES", "Feature"]
