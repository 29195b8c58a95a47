"""docs/litellm.md against the code it describes."""

import re
from pathlib import Path

from mrss_provider.openai_schema import CHAT_KEYS, COMPLETION_KEYS
from mrss_provider.provider.calls import LITELLM_KEYS
from mrss_provider.provider.engines import ADMISSION_WAIT_S
from mrss_provider.provider.error_map import TABLE, to_litellm

TEXT = (Path(__file__).parent.parent.parent / "docs/litellm.md").read_text()


def rows(section):
    """Return the cells of each table row in `section`, headings left out."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names(cell):
    return re.findall(r"`(\w+)`", cell)


def test_error_table_is_the_one_in_the_code():
    section = TEXT.split("## Errors, retries, cooldowns")[1].split("## Workers")[0]
    told = {
        names(ours)[0]: (names(theirs)[0], int(status)) for ours, theirs, status in rows(section)
    }
    assert told == {
        cls.__name__: (target.__name__, to_litellm(cls("x"), "mrss/base").status_code)
        for cls, target in TABLE.items()
    }


def test_parameters_are_told_as_they_are_treated():
    section = TEXT.split("## Parameters")[1].split("## Caching")[0]
    told = {what: names(cell) for cell, what in rows(section)}
    known = CHAT_KEYS.honoured | COMPLETION_KEYS.honoured
    for what, params in told.items():
        if what.startswith("reach the engine"):
            assert set(params) <= known
        elif "the engine accepts them" in what:
            assert set(params) <= CHAT_KEYS.accepted
        elif what.startswith("refused by the engine (400), by name"):
            assert set(params) <= set(CHAT_KEYS.refused)
    own = next(params for what, params in told.items() if what == "LiteLLM's own")
    assert set(LITELLM_KEYS) <= set(own)


def test_numbers_in_the_text_are_those_of_the_code():
    assert f"longer than {ADMISSION_WAIT_S:g} s for the admission" in TEXT
