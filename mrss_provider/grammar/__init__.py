"""Grammars: a JSON Schema, regular expression or Lark text to a constraint over token ids.

llguidance does the parsing and the masks, and is imported when the first answer asks for a grammar.
"""

from mrss_provider.grammar.compiler import Grammars
from mrss_provider.grammar.constraint import GrammarConstraint
from mrss_provider.grammar.schema import HONOURED, REFUSED, prepare_schema

__all__ = ["HONOURED", "REFUSED", "GrammarConstraint", "Grammars", "prepare_schema"]
