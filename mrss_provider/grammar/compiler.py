"""Grammars: compiles what requests ask for, off the event loop, and keeps the last ones."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mrss_provider.backend import Grammar
from mrss_provider.errors import InvalidRequestError, QueueFullError
from mrss_provider.grammar.constraint import GrammarConstraint, first_line
from mrss_provider.grammar.lark import prepare_lark
from mrss_provider.grammar.schema import (
    HONOURED,
    MAX_REGEX_CHARS,
    OPTIONS,
    REFUSED,
    prepare_schema,
)
from mrss_provider.grammar.vocabulary import Vocabulary
from mrss_provider.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CHARS = 131_072
"""Of a schema, expression or grammar."""

MAX_COMPILE_S = 10.0
"""How long a request waits for its grammar."""

MAX_CACHED = 64
MAX_CACHED_CHARS = 1_000_000

# What one mask and the lexer as a whole may cost: about 15 ms, and about 100 MB.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    # Where a thousand properties may come next there are four thousand.
    "max_items_in_row": 10_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}


@dataclass(frozen=True)
class GrammarStats:
    """What has been compiled since the start."""

    num_compiled: int
    num_hits: int
    num_cached: int


class Grammars:
    """The compiled grammars of one model. Any thread and any event loop.

    Args:
        tokenizer: of the model.
        vocab_size: logits that the model gives.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        # Apart, as what it guards takes long: nobody on an event loop waits for it.
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._num_compiled = 0
        self._num_hits = 0
        # One: whoever sends costly grammars keeps one core busy, not all.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mrss-grammar")

    async def begin(
        self,
        grammar: Grammar,
        *,
        lead: str = "",
        before: str = "",
        answered: Iterable[int] = (),
        stops: tuple[str, ...] = (),
    ) -> GrammarConstraint:
        """Return the constraint of an answer that has not begun.

        Args:
            grammar: what it conforms to.
            lead: what the model may write before it.
            before: how it begins, where it is gone on with.
            answered: the same as tokens that the model wrote.
            stops: strings that end an answer of this model: where the grammar lets it end, a token
                that is one of them means the end.

        Raises:
            InvalidRequestError: a grammar that cannot be honoured, or a beginning that it does not
                allow.
            QueueFullError: others' grammars are being compiled.
        """
        matcher = self._cached(grammar)
        if matcher is None:
            matcher = await self._compile_soon(grammar, lead, stops)
        vocabulary = self._known()
        constraint = GrammarConstraint(
            matcher.deep_copy(),
            vocabulary.num_words,
            grammar.param,
            lead=vocabulary.lead(lead) if lead and not before else None,
            end_ids=vocabulary.ends(stops),
        )
        answered = tuple(answered)
        if not (before or answered):
            return constraint
        try:
            # Each token may take as long as a mask, and there may be as many as fit in a prompt.
            await asyncio.to_thread(_follow, constraint, vocabulary, before, answered)
        except InvalidRequestError as exc:
            raise InvalidRequestError(
                f"{grammar.param} must allow how the answer begins, which it does not; send a last "
                "message of the user, or leave it out",
                param=grammar.param,
            ) from exc
        return constraint

    def stats(self) -> GrammarStats:
        """Return counts since the start."""
        with self._lock:
            return GrammarStats(self._num_compiled, self._num_hits, len(self._compiled))

    async def _compile_soon(self, grammar: Grammar, lead: str, stops: tuple[str, ...]) -> LLMatcher:
        job = self._worker.submit(self._prepare, grammar, lead, stops)
        try:
            # Whoever gives up takes back what has not begun; what has goes on, and is kept.
            return await asyncio.wait_for(asyncio.wrap_future(job), MAX_COMPILE_S)
        except TimeoutError as exc:
            if job.cancel():
                raise QueueFullError(
                    f"{grammar.param}: others' grammars took {MAX_COMPILE_S:g} s, and this one has "
                    "not had its turn; try again later",
                    retry_after_s=MAX_COMPILE_S,
                ) from exc
            raise InvalidRequestError(
                f"{grammar.param}: the grammar was not ready in {MAX_COMPILE_S:g} s; make it "
                "simpler, or try again later",
                param=grammar.param,
            ) from exc

    def _prepare(self, grammar: Grammar, lead: str, stops: tuple[str, ...]) -> LLMatcher:
        """Compile a grammar, and find once what every answer of this model needs."""
        self._known().lead(lead)
        self._known().ends(stops)
        return self._compile(grammar)

    def _known(self) -> Vocabulary:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size)
            return self._vocabulary

    def _cached(self, grammar: Grammar) -> LLMatcher | None:
        with self._lock:
            found = self._compiled.get((grammar.kind, grammar.text))
            if found is not None:
                self._compiled.move_to_end((grammar.kind, grammar.text))
                self._num_hits += 1
            return found

    def _keep(self, grammar: Grammar, matcher: LLMatcher) -> None:
        with self._lock:
            self._num_compiled += 1
            self._compiled[grammar.kind, grammar.text] = matcher
            while (
                len(self._compiled) > MAX_CACHED
                or sum(len(text) for _, text in self._compiled) > MAX_CACHED_CHARS
            ):
                self._compiled.popitem(last=False)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """Return a matcher at the beginning of a grammar, which has been looked at once.

        Raises:
            InvalidRequestError: as `begin`.
        """
        import numpy as np
        from llguidance import LLMatcher, LLParserLimits

        found = self._cached(grammar)
        if found is not None:
            return found
        vocabulary = self._known()
        try:
            source = _source(grammar)
        except ValueError as exc:
            # It reads JSON more strictly: numbers that no double holds, hundreds of levels.
            raise _refusal(grammar, str(exc)) from exc
        matcher = LLMatcher(
            vocabulary.tokens, source, log_level=0, limits=LLParserLimits(**_LIMITS)
        )
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise _refusal(grammar, warnings[0])
        words = np.zeros(vocabulary.num_words, dtype=np.uint32)
        GrammarConstraint(matcher, len(words), grammar.param).fill_mask(words)
        if not words.any():
            raise InvalidRequestError(
                f"{grammar.param} allows no answer at all; it asks for what excludes itself",
                param=grammar.param,
            )
        self._keep(grammar, matcher)
        return matcher


def _follow(
    constraint: GrammarConstraint, vocabulary: Vocabulary, before: str, answered: tuple[int, ...]
) -> None:
    """Move `constraint` on by how an answer begins: a text, and tokens."""
    for token_id in (*vocabulary.encode(before), *answered):
        constraint.advance(token_id)


def _source(grammar: Grammar) -> str:
    """Return a grammar as llguidance takes it.

    Raises:
        InvalidRequestError: too long, or what cannot be honoured.
        ValueError: a schema that llguidance cannot read.
    """
    from llguidance import LLMatcher

    text, param = grammar.text, grammar.param
    if not 0 < len(text) <= MAX_CHARS:
        raise InvalidRequestError(
            f"{param} must have 1 to {MAX_CHARS} characters, got {len(text)}", param=param
        )
    if grammar.kind == "regex":
        if len(text) > MAX_REGEX_CHARS:
            raise InvalidRequestError(
                f"{param} must have at most {MAX_REGEX_CHARS} characters, got {len(text)}",
                param=param,
            )
        source: str = LLMatcher.grammar_from_regex(text)
    elif grammar.kind == "lark":
        source = LLMatcher.grammar_from_lark(prepare_lark(text, param))
    else:
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequestError(
                f"{param}: the schema is no JSON that can be read ({exc})", param=param
            ) from exc
        prepared = json.dumps(prepare_schema(schema, param))
        source = LLMatcher.grammar_from_json_schema(prepared, overrides=cast(Any, dict(OPTIONS)))
    return source


# What llguidance says of a keyword, where it does not name it.
_MEANT = (
    ("Unknown format", "format"),
    ("oneOf", "oneOf"),
    ("min/maxProperties", "minProperties"),
    ("minProperties", "minProperties"),
    ("maxProperties", "maxProperties"),
    ("patternProperty", "patternProperties"),
    ("additionalProperties", "additionalProperties"),
    ("required", "required"),
    ("regex", "pattern"),
    ("Regex", "pattern"),
    ("lookaround", "pattern"),
    ("Pointer", "$ref"),
    ("Resource", "$ref"),
    ("intersection", "allOf"),
    ("multipleOf", "multipleOf"),
    ("exclusiveMinimum", "exclusiveMinimum"),
    ("minimum", "minimum"),
    ("minItems", "minItems"),
    ("prefixItems", "prefixItems"),
    ("minLength", "minLength"),
    ("type", "type"),
)
# Lines of the text that a message is about.
_EXCERPT = re.compile(r"(?m)^\s*\d+ \|.*$")
_SAID = re.compile(r"\"([$\w]+)\"|'([$\w]+)'")


def _refusal(grammar: Grammar, message: str) -> InvalidRequestError:
    """Return the error for what llguidance said of a grammar."""
    # What is wrong with an expression stands behind a picture of where.
    told = first_line(message.removeprefix("WARNING: ").split("\nerror:", 1)[-1])
    is_schema = grammar.kind == "json_schema" or "JSON schema" in message
    keyword = _keyword(message) if is_schema else None
    what = {"json_schema": "the schema", "regex": "the expression", "lark": "the grammar"}
    verb = "allows no answer at all" if "Unsatisfiable" in message else "cannot be honoured"
    which = what[grammar.kind] if keyword is None else f"the schema keyword {keyword!r}"
    if keyword is not None:
        verb = "cannot be honoured"
    return InvalidRequestError(f"{grammar.param}: {which} {verb}: {told}", param=grammar.param)


def _keyword(message: str) -> str | None:
    """Return the keyword of JSON Schema that a message is about, if it can be told."""
    said = _EXCERPT.sub("", message)
    for quoted in _SAID.finditer(said):
        name = quoted[1] or quoted[2]
        if name in HONOURED | REFUSED:
            return name
    return next((keyword for sign, keyword in _MEANT if sign in said), None)
