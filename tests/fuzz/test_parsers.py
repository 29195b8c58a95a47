"""Whatever is put before a parser, it understands it or says what is wrong with it."""

import contextlib
import importlib
import tempfile

import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS

from mrss_provider.async_engine.card import read_card
from mrss_provider.chat import load_template
from mrss_provider.engine.mixtures_file import read_mixtures
from mrss_provider.engine.mixtures_writer import drop_table
from mrss_provider.errors import ConfigError, ConflictError, MRSSError

# Where formats have their turns: what a number, a name or a frame may not be.
TOKENS = [
    b"",
    b"\0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b'"',
    b"[",
    b"{}",
    b"\r\n",
    b"\xff\xff",
    b"[" * 2000,
]


@st.composite
def mutated(draw, seeds):
    """Return a seed with pieces replaced, removed, repeated or cut off; or anything at all."""
    data = draw(st.sampled_from([*seeds, b""]))
    for _ in range(draw(st.integers(0, 4))):
        # Headers and numbers are at the front.
        limit = draw(st.sampled_from([min(len(data), 64), len(data)]))
        at = draw(st.integers(0, limit))
        length = draw(st.integers(0, 8))
        piece = draw(
            st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8), st.just(data[at : at + 40]))
        )
        data = data[:at] + piece + data[at + length :]
    end = draw(st.one_of(st.none(), st.integers(0, len(data))))
    return data[:end]


def check(name, num_examples):
    target = TARGETS[name]
    for seed in target.seeds:
        # What is mutated is understood before.
        with contextlib.nullcontext():
            target.run(seed)

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(target.seeds))
    def run(data):
        with contextlib.suppress(MRSSError):
            target.run(data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_understands_or_says_what_is_wrong(name):
    check(name, 150)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_withstands_much_more(name):
    check(name, 2000)


def test_no_file_is_left_of_what_parsers_read(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # What a run begins with is made when the module is.
    targets.LOOP.close()
    importlib.reload(targets)
    for target in targets.TARGETS.values():
        target.run(target.seeds[0])
    assert list(tmp_path.iterdir()) == []


DEEP = "x = " + "[" * 5000


def test_toml_that_is_nested_beyond_reading_is_refused(tmp_path):
    for name in ("mixtures.toml", "card.toml"):
        (tmp_path / name).write_text(DEEP)
    good, bad = read_mixtures(tmp_path / "mixtures.toml")
    assert (good, list(bad)) == ({}, ["mixtures.toml"])
    with pytest.raises(ConfigError, match=r"card\.toml"):
        read_card(tmp_path)
    with pytest.raises(ConflictError, match="cannot be read"):
        drop_table(DEEP, "a")
    (tmp_path / "x.jinja").write_text(f"{{#toml\n{DEEP}\n#}}")
    with pytest.raises(ConfigError, match="no TOML"):
        load_template("x.jinja", tmp_path)
