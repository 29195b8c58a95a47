"""Expressions, Lark texts, the cache of compiled grammars, and where answers begin and end."""

import asyncio
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from accepting import ENTRIES, VOCAB_SIZE, accepts, begin, encode, mask, new_grammars

from mrss_provider.backend import Grammar
from mrss_provider.errors import InvalidRequestError, QueueFullError
from mrss_provider.grammar import compiler
from mrss_provider.tokenizer import Tokenizer

GRAMMARS = new_grammars()
CALL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def lark(text):
    return begin(GRAMMARS, text, "lark", param="mrss.grammar")


def regex(text, **options):
    return begin(GRAMMARS, text, "regex", param="mrss.regex", **options)


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        (r"[a-c]{2,3}|\d+", ["ab", "abc", "a", "12", "ab1", ""]),
        ("(?i)yes|no", ["YES", "No", "maybe"]),
        ("é+ world", ["éé world", " world", "é"]),
        ("a/b\\n", ["a/b\n", "a/b"]),
        (".*", ["anything at all", "", "two\nlines"]),
    ],
)
def test_an_expression_matches_the_whole_answer(pattern, texts):
    constraint = regex(pattern)
    for text in texts:
        assert accepts(constraint, text) == bool(re.fullmatch(pattern, text)), text


def test_tokens_that_hold_part_of_a_character_are_allowed_within_one():
    constraint = regex("[天今]")
    whole, parts = ENTRIES.items(), "今".encode()
    piece = next(i for i, entry in whole if entry == parts[:2])
    last = next(i for i, entry in whole if entry == parts[2:])
    assert accepts(constraint, [piece, last])
    assert not accepts(constraint, [piece])


def test_ids_without_an_entry_are_never_allowed():
    allowed = mask(regex("(?s:.*)"))
    assert 0 in allowed
    assert allowed - {0} <= set(ENTRIES)
    assert max(ENTRIES) < VOCAB_SIZE - 1


def test_a_lark_text_may_hold_json_schemas_which_are_checked_like_any_other():
    constraint = lark(f'start: "call " call\ncall: %json {json.dumps(CALL)}\n')
    assert accepts(constraint, 'call {"city": "Oslo"}')
    assert not accepts(constraint, 'call {"city": 1}')
    assert not accepts(constraint, r'call {"city": "x", "\u0061": 1}')
    with pytest.raises(InvalidRequestError, match=r"mrss\.grammar: .*'uniqueItems'"):
        lark('start: %json {"type": "array", "uniqueItems": true}')
    with pytest.raises(InvalidRequestError, match=r"keyword 'pattern' .*: look-around"):
        lark('start: %json {"type": "string", "pattern": "a(?=b)"}')
    with pytest.raises(InvalidRequestError, match="'x-guidance'"):
        lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}')


def test_a_grammar_can_begin_after_free_text():
    text = f"""
        start: tail | (head call "</tool>")+ tail
        head[lazy]: /(?s:.*)<tool>/
        tail: /(?s:.*)/
        call: %json {json.dumps(CALL)}
    """
    constraint = lark(text)
    call = '<tool>{"city":"Oslo"}</tool>'
    for good in ("just text", call, f"I call:\n\n{call}{call}", f"{call} done"):
        assert accepts(constraint, good)
    for bad in ("<tool>", '<tool>{"city":1}</tool>', "a <tool> b"):
        assert not accepts(constraint, bad)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("start: (", "Expected token"),
        ('begin: "a"', "no start rule"),
        ("start: nobody", "nobody"),
        ("start: X\nX: /a/ & /b/", "allows no answer"),
        ('start: x "b"\nx[stop=""]: /.*/', "'stop'"),
        ("start: x\nx[lazy, temperature=0.5]: /a*b/", "'temperature'"),
        ("start[max_tokens=3]: /.*/", "'max_tokens'"),
        ("start: <[5]>", "<[5]>"),
        ('start: "a" <|endoftext|>', "<|endoftext|>"),
        ('start: /a\n"/ <[5]> /"b/', "<[5]>"),
        ('start: / "/ <[5]> /"/', "<[5]>"),
        ('start: "' + 60_000 * '\\"', "has no end"),
        ("start: /" + 60_000 * "\\/", "has no end"),
        ("start: " + 300 * "%json {} ", "256 %json"),
        ("start: @other", "'@other'"),
        ('%llguidance {"no_forcing": true}\nstart: "a"', "%llguidance"),
        ("start: %json nothing", "%json must be followed by a JSON Schema"),
        ("start: %json true", "must be followed by an object"),
        ("start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
        ("", "1 to 131072 characters, got 0"),
    ],
    ids=range(20),
)
def test_a_lark_text_that_cannot_be_followed_is_refused_in_a_sentence(text, told):
    with pytest.raises(InvalidRequestError) as caught:
        lark(text)
    assert told in str(caught.value)
    assert str(caught.value).startswith("mrss.grammar")
    assert caught.value.param == "mrss.grammar"
    assert len(str(caught.value)) < 400


def test_what_looks_like_an_attribute_or_token_within_a_string_is_text():
    constraint = lark(
        'start: "<b>" x\nx: /@a<[1]>|y/  // stop=1 <c>\n# x[stop=""]: @d\nY: "x[stop=1]:"'
    )
    assert accepts(constraint, "<b>y")
    assert accepts(constraint, "<b>@a<1>")


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"(a)\1", r"\bword", "[z-a]"])
def test_an_expression_that_cannot_be_followed_is_refused_in_a_sentence(pattern):
    with pytest.raises(
        InvalidRequestError, match=r"mrss\.regex: the expression cannot be"
    ) as caught:
        regex(pattern)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith("^")


@pytest.mark.parametrize("limit", ["initial_lexer_fuel", "step_lexer_fuel"])
def test_a_grammar_that_is_too_much_work_ends_in_a_sentence(monkeypatch, limit):
    monkeypatch.setitem(compiler._LIMITS, limit, 5)
    with pytest.raises(InvalidRequestError, match=r"mrss\.grammar.*too (big|much work)") as caught:
        begin(
            new_grammars(), "start: X\nX: /(.*a.{9})/ & ~/(.*b.{9})/", "lark", param="mrss.grammar"
        )
    assert "\n" not in str(caught.value)


def test_a_compiled_grammar_is_compiled_once_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(compiler, "MAX_CACHED", 3)
    monkeypatch.setattr(compiler, "MAX_CACHED_CHARS", 40)
    grammars = new_grammars()
    for text in ("a", "b", "a", "c", "a", "d", "a"):
        begin(grammars, text, "regex")
    assert grammars.stats() == compiler.GrammarStats(num_compiled=4, num_hits=3, num_cached=3)
    begin(grammars, "b" * 39, "regex")
    # Too long beside the others but for the last.
    assert grammars.stats().num_cached == 2
    begin(grammars, "a", "regex")
    assert grammars.stats().num_hits == 4


def test_a_failed_grammar_is_not_kept():
    grammars = new_grammars()
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            begin(grammars, "(", "regex")
    assert grammars.stats().num_cached == 0


def slowed(monkeypatch):
    """Let compiling wait; return what tells that it has begun, and what lets it go on."""
    is_reached, may_go = threading.Event(), threading.Event()
    source = compiler._source

    def slow(grammar):
        is_reached.set()
        assert may_go.wait(30)
        return source(grammar)

    monkeypatch.setattr(compiler, "_source", slow)
    return is_reached, may_go


def test_the_event_loop_runs_on_while_a_grammar_compiles(monkeypatch):
    grammars = new_grammars()
    is_reached, may_go = slowed(monkeypatch)

    async def main():
        waiting = asyncio.create_task(grammars.begin(Grammar("regex", "a")))
        await asyncio.to_thread(is_reached.wait)
        assert not waiting.done()
        may_go.set()
        return await waiting

    assert accepts(asyncio.run(main()), "a")


def test_a_grammar_that_is_not_ready_in_time_is_an_error_and_later_there(monkeypatch):
    grammars = new_grammars()
    is_reached, may_go = slowed(monkeypatch)

    async def too_late(waiting, timeout_s):
        await asyncio.to_thread(is_reached.wait, 30)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "wait_for", too_late)
        with pytest.raises(InvalidRequestError, match="not ready in 10 s"):
            begin(grammars, "a", "regex")
    may_go.set()
    assert accepts(begin(grammars, "a", "regex"), "a")


def test_a_grammar_that_had_no_turn_in_time_is_not_what_is_wrong(monkeypatch):
    grammars = new_grammars()
    is_reached, may_go = slowed(monkeypatch)

    async def main():
        first = asyncio.create_task(grammars.begin(Grammar("regex", "a")))
        await asyncio.to_thread(is_reached.wait, 30)
        monkeypatch.setattr(compiler, "MAX_COMPILE_S", 0.01)
        with pytest.raises(QueueFullError, match="not had its turn"):
            await grammars.begin(Grammar("regex", "b"))
        may_go.set()
        await first

    asyncio.run(main())
    assert grammars.stats().num_compiled == 1


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(monkeypatch):
    grammars = new_grammars()
    is_reached, may_go = slowed(monkeypatch)

    async def main():
        first = asyncio.create_task(grammars.begin(Grammar("regex", "a")))
        await asyncio.to_thread(is_reached.wait)
        gone = asyncio.create_task(grammars.begin(Grammar("regex", "b")))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        last = asyncio.create_task(grammars.begin(Grammar("regex", "c")))
        # What waits in the executor hears of it in the loop's next turn.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        may_go.set()
        await asyncio.gather(first, last)

    asyncio.run(main())
    assert grammars.stats().num_compiled == 2


def test_a_fork_goes_its_own_way():
    first = regex("ab|cd")
    second = first.fork()
    first.advance(encode("a")[0])
    second.advance(encode("c")[0])
    assert mask(first) == {encode("b")[0]}
    assert mask(second) == {encode("d")[0]}


def test_an_answer_is_complete_where_nothing_but_the_end_may_follow():
    constraint = regex("ab?")
    assert not constraint.is_complete
    constraint.advance(encode("a")[0])
    assert (constraint.may_end, constraint.is_complete) == (True, False)
    constraint.advance(encode("b")[0])
    assert constraint.is_complete
    assert mask(constraint) == {0}
    with pytest.raises(InvalidRequestError, match="does not allow"):
        constraint.advance(encode("b")[0])


def test_the_first_token_may_bring_the_lead_and_then_always_means_it():
    ids = {entry: i for i, entry in ENTRIES.items()}
    red, space, r = ids[b" red"], ids[b" "], ids[b"r"]
    constraint = regex("red|green", lead=" ")
    assert {red, space, r} <= mask(constraint)
    for tokens in ([red], [space, *encode("red")], encode("red")):
        assert accepts(constraint, tokens)
    assert not accepts(constraint, [space, red])
    # A space of the answer's own comes behind that of the lead.
    spaced = regex(" ?red", lead=" ")
    for tokens in ([red], [space, red], encode("red")):
        assert accepts(spaced, tokens)
    # Without a lead it is text.
    assert not accepts(regex("red"), [red])


def test_an_answer_that_is_gone_on_with_is_the_beginning_of_the_whole():
    constraint = begin(GRAMMARS, CALL, before='{"city": "Os', lead=" ")
    assert accepts(constraint, 'lo"}')
    assert not accepts(constraint, '{"city": "Oslo"}')
    with pytest.raises(InvalidRequestError, match="must allow how the answer begins"):
        begin(GRAMMARS, CALL, before='{"town"')
    told = encode(' {"city"')
    assert accepts(begin(GRAMMARS, CALL, answered=told, lead=" "), ':"x"}')


def test_a_stop_string_of_one_token_means_the_end():
    blank = next(i for i, entry in ENTRIES.items() if entry == b"\n\n")
    assert regex("a", stops=("\n\n", "\nUser:")).end_ids == (blank,)
    assert regex("a").end_ids == ()


@pytest.mark.slow
def test_the_world_vocabulary_has_the_same_constraints():
    tokenizer = Tokenizer.load()
    grammars = compiler.Grammars(tokenizer, 65_536)
    constraint = begin(grammars, CALL, lead=" ", stops=("\n\n",))
    assert [tokenizer.token_bytes(i) for i in constraint.end_ids] == [b"\n\n"]
    for text in ('{"city": "Ōsaka 大阪 😀"}', ' {"city":"x"}'):
        assert accepts(constraint, tokenizer.encode(text))
    assert not accepts(constraint, tokenizer.encode('{"city": 1}'))
    assert not any(i >= 65_530 for i in mask(constraint))


def test_llguidance_is_imported_with_the_first_grammar():
    program = "import sys, mrss_provider.grammar; print('llguidance' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_masks_found_together_are_those_found_alone():
    """Of answers at other places, with a lead, complete ones, and one that has failed."""
    constraints = [
        regex("[a-z]{2,9}"),
        lark('start: "yes" | "no"'),
        regex("abc", lead=" "),
        begin(GRAMMARS, json.dumps(CALL), "json_schema"),
        regex("x"),
        regex("[0-9]+"),
    ]
    constraints[0].advance(encode("q")[0])
    constraints[4].advance(encode("x")[0])
    with pytest.raises(InvalidRequestError):
        constraints[5].advance(encode("a")[0])
    alone = [constraint.fork() for constraint in constraints]
    masks = np.full((len(constraints), constraints[0].num_words), 7, dtype=np.uint32)
    errors = constraints[0].fill_masks(constraints, masks)
    for constraint, words, error in zip(alone[:5], masks, errors, strict=False):
        own = np.zeros_like(words)
        constraint.fill_mask(own)
        assert error is None
        assert (words == own).all()
    assert isinstance(errors[5], InvalidRequestError)
