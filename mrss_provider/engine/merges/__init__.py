"""Merge rules: the rows of a mixture become one row of logits. A file each, a line here each."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from mrss_provider.engine.merges.contrast import Contrast
from mrss_provider.engine.merges.delta import Delta
from mrss_provider.engine.merges.geometric import Geometric
from mrss_provider.engine.merges.linear import Linear
from mrss_provider.engine.merges.power import Power
from mrss_provider.engine.merges.product import Product
from mrss_provider.engine.merges.route import Route
from mrss_provider.engine.merges.rows import LOG_PROB_FLOOR, Rows
from mrss_provider.engine.merges.rule import MergeRule
from mrss_provider.mixture import Method

__all__ = ["LOG_PROB_FLOOR", "MERGE_RULES", "MergeRule", "Rows", "make_merge"]

MERGE_RULES: dict[str, Callable[..., MergeRule]] = {
    "linear": Linear,
    "geometric": Geometric,
    "product": Product,
    "power": Power,
    "delta": Delta,
    "contrast": Contrast,
    "route": Route,
}
"""The class of every rule, by name: the one place where a rule is registered."""


@lru_cache(maxsize=256)
def make_merge(method: Method) -> MergeRule:
    """Return the merge rule that `method` names, with its parameters."""
    return MERGE_RULES[method.name](**method.parameters)
