"""`mrss gate list`: what it says is what the tables say, and it is quick."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import mrss

from mrss_provider.mixture import TABLES, make_method


@pytest.fixture
def states(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "harbour.safetensors").touch()
    return tmp_path


def test_json_has_every_merge_rule_and_gate(states: Path) -> None:
    listed = json.loads(mrss("gate", "list", "--json", "--states", states).out)
    assert list(listed) == ["gates", "merges"]
    assert [merge["name"] for merge in listed["merges"]] == list(TABLES["merge"])
    assert [gate["name"] for gate in listed["gates"]] == list(TABLES["gate"])
    assert [gate["name"] for gate in listed["gates"] if gate["needs_training"]] == ["learned"]
    for kind, methods in (("merge", listed["merges"]), ("gate", listed["gates"])):
        for method in methods:
            for parameter in method["parameters"]:
                assert parameter.keys() & {"range", "choices", "format"}
                assert parameter["doc"]
                # A default is a value that the method takes.
                if parameter["default"] is not None and method["name"] != "schedule":
                    given = {parameter["name"]: parameter["default"]}
                    assert make_method(kind, method["name"], given).values == ()
    (learned,) = (gate for gate in listed["gates"] if gate["name"] == "learned")
    assert learned["parameters"][0]["choices"] == ["harbour"]


def test_the_table_tells_defaults_and_what_is_allowed(states: Path) -> None:
    lines = mrss("gate", "list", "--states", states).out.splitlines()
    (power,) = (line for line in lines if line.startswith("power"))
    assert "exponent   0.5      -10 to 10" in power
    (learned,) = (line for line in lines if line.startswith("learned"))
    assert learned.split()[:3] == ["learned", "file", "harbour"]
    empty = mrss("gate", "list", "--states", states / "gates").out
    assert "none yet" in empty


def test_no_torch_is_loaded_for_it(states: Path) -> None:
    program = (
        "import sys; from mrss_provider.cli.app import app\n"
        f"sys.argv = ['mrss', 'gate', 'list', '--states', {str(states)!r}]\n"
        "try: app()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
