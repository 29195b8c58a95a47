"""The name of a mixture: `<terms>[@model][~merge][~gate]`, parsed and in canonical form.

A leaf: standard library only, so that clients can check a name without an engine. `names` has the
grammar, `methods` the merge rules and gates with their parameters, `scanner` reads both.
"""

from mrss_provider.mixture.methods import (
    DEFAULT_GATE,
    DEFAULT_MERGE,
    GATES,
    MERGES,
    TABLES,
    Kind,
    Method,
    Parameter,
    Points,
    Value,
    make_method,
    parse_method,
)
from mrss_provider.mixture.names import (
    BASE,
    DEFAULT_CUT,
    HIJACKED_SUBSTRINGS,
    Mixture,
    Term,
    canonical_weights,
    check_name,
    check_signs,
    check_terms,
    check_weight,
    parse_mixture,
)
from mrss_provider.mixture.scanner import NAME_PATTERN

__all__ = [
    "BASE",
    "DEFAULT_CUT",
    "DEFAULT_GATE",
    "DEFAULT_MERGE",
    "GATES",
    "HIJACKED_SUBSTRINGS",
    "MERGES",
    "NAME_PATTERN",
    "TABLES",
    "Kind",
    "Method",
    "Mixture",
    "Parameter",
    "Points",
    "Term",
    "Value",
    "canonical_weights",
    "check_name",
    "check_signs",
    "check_terms",
    "check_weight",
    "make_method",
    "parse_method",
    "parse_mixture",
]
