"""Changing one table of mixtures.toml. Oracle: tomllib, and the lines around the table."""

import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrss_provider.engine.mixtures_file import NamedMixture, parse_table, read_mixtures
from mrss_provider.engine.mixtures_writer import drop_table, mixture_table, put_table
from mrss_provider.errors import ConflictError
from mrss_provider.mixture import Method, Term

TEXT = """\
# The folder's mixtures.

# Facts, told warmly.
[story]
terms = "knowledge+tone"   # both alike
# merge is the default
temperature = 0.9

# Plain.
[plain]
terms = "knowledge"
"""

PLAIN = NamedMixture((Term("knowledge"), Term("base", 0.5)), Method("linear"))


def test_a_new_table_goes_to_the_end_and_nothing_else_changes():
    changed = put_table(TEXT, "new", PLAIN)
    assert changed.startswith(TEXT)
    assert changed[len(TEXT) :] == ('\n[new]\nterms = "knowledge+base:0.5"\nmerge = "linear"\n')


def test_a_changed_table_keeps_its_comments_and_its_neighbours():
    changed = put_table(TEXT, "story", PLAIN)
    assert changed == TEXT.replace(
        'terms = "knowledge+tone"   # both alike\n# merge is the default\ntemperature = 0.9\n',
        '# merge is the default\nterms = "knowledge+base:0.5"\nmerge = "linear"\n',
    )


def test_a_dropped_table_takes_its_own_comments_only():
    changed = drop_table(TEXT, "story")
    assert changed == ('# The folder\'s mixtures.\n\n# Plain.\n[plain]\nterms = "knowledge"\n')
    assert drop_table(TEXT, "absent") == TEXT


@pytest.mark.parametrize(
    "text",
    [
        'story = { terms = "knowledge" }\n',
        'story.terms = "knowledge"\n',
        '[story]\nterms = "knowledge"\ndescription = """\n[plain]\n"""\n[more]\nterms = "a"\n',
        "[story]\n[story",
    ],
    ids=["inline", "dotted", "a header in a text", "no toml"],
)
def test_a_text_that_is_not_understood_is_refused(text):
    with pytest.raises(ConflictError, match=r"by hand|cannot be read"):
        put_table(text, "story", PLAIN)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
mixtures = st.builds(
    NamedMixture,
    terms=st.lists(st.builds(Term, names, st.floats(1e-6, 1e6)), min_size=1, max_size=3).map(tuple),
    merge=st.sampled_from([None, Method("linear"), Method("power", (("exponent", 0.25),))]),
    gate=st.sampled_from([None, Method("fixed"), Method("novelty", (("tau", 0.1),))]),
    reinject=st.sampled_from([None, "never", "turn"]),
    temperature=st.none() | st.floats(0, 2),
    top_p=st.none() | st.floats(0.01, 1),
    sampling_order=st.sampled_from([None, "openai", "rwkv"]),
    description=texts,
    display_name=texts,
)


def test_line_breaks_of_windows_are_understood():
    changed = put_table(TEXT.replace("\n", "\r\n"), "story", PLAIN)
    assert tomllib.loads(changed)["story"] == mixture_table(PLAIN)
    assert tomllib.loads(changed)["plain"] == {"terms": "knowledge"}


@given(st.lists(st.tuples(names, mixtures), max_size=4), names, mixtures)
def test_whatever_is_written_reads_as_it_was_meant(before, name, mixture):
    text = TEXT
    for old, content in before:
        text = put_table(text, old, content)
    changed = put_table(text, name, mixture)
    expected = {**tomllib.loads(text), name: mixture_table(mixture)}
    assert tomllib.loads(changed) == expected
    assert parse_table(tomllib.loads(changed)[name]) == mixture
    dropped = tomllib.loads(drop_table(changed, name))
    assert dropped == {key: table for key, table in expected.items() if key != name}


def test_a_file_with_display_names_is_read(tmp_path):
    path = tmp_path / "mixtures.toml"
    path.write_text(put_table("", "story", replace(PLAIN, display_name="Story teller")))
    good, bad = read_mixtures(path)
    assert not bad
    assert good["story"].display_name == "Story teller"
