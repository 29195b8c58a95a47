"""The limits of both configurations."""

import math
import re
from pathlib import Path

import pytest

from mrss_provider.config import EngineConfig, ServerConfig, misspelt_variables
from mrss_provider.errors import ConfigError


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (ServerConfig, "request_timeout_s", 0.0),
        (ServerConfig, "request_timeout_s", -1.0),
        (ServerConfig, "request_timeout_s", math.nan),
        (ServerConfig, "drain_s", math.nan),
        (ServerConfig, "idle_exit_s", math.nan),
        (ServerConfig, "drain_s", -1.0),
        (EngineConfig, "max_rows", 0),
        (EngineConfig, "threads", 100_000),
    ],
)
def test_a_value_beyond_its_limit_is_refused_by_name(cls, name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        cls.from_env(env={f"MRSS_{name.upper()}": str(value)})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("cls", "name", "value", "allowed"),
    [
        (EngineConfig, "threads", "4", "an integer"),
        (EngineConfig, "max_rows", 4.0, "an integer"),
        (EngineConfig, "max_rows", True, "an integer"),
        (EngineConfig, "strict", 1, "true or false"),
        (EngineConfig, "model", None, "a path"),
        (EngineConfig, "cache_dir", b"cache", "a path"),
        (EngineConfig, "cache_dir", "", "a path"),
        (EngineConfig, "template", 1, "a text"),
        (ServerConfig, "port", "9000", "an integer"),
        (ServerConfig, "drain_s", "1", "a number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(cls, name, value, allowed):
    with pytest.raises(ConfigError, match=f"{name} must be {allowed}, got {value!r}") as caught:
        cls(**{name: value})
    assert caught.value.param == name


def test_paths_may_be_given_as_texts():
    config = EngineConfig(model="models/x.pth", cache_dir="cache")
    assert config == EngineConfig(model=Path("models/x.pth"), cache_dir=Path("cache"))
    assert ServerConfig(socket="/run/mrss.sock", drain_s=1).socket == Path("/run/mrss.sock")


def test_values_at_their_limits_are_taken():
    config = ServerConfig(request_timeout_s=0.001, drain_s=0.0, idle_exit_s=0.0)
    assert config.request_timeout_s == 0.001
    assert EngineConfig(max_rows=1).max_rows == 1


@pytest.mark.parametrize(
    "origin", ["a.example", "https://a.example/", "https://a.example/app", "x y"]
)
def test_an_origin_that_no_page_has_is_refused(origin):
    with pytest.raises(ConfigError, match="without a path") as caught:
        ServerConfig(cors_origins=f"https://b.example, {origin}")
    assert caught.value.param == "cors_origins"
    assert repr(origin) in caught.value.message


def test_origins_that_pages_have_are_taken():
    told = "https://a.example, http://localhost:3000,http://[::1]:8080,null,*,moz-extension://ab-cd"
    assert ServerConfig(cors_origins=told).cors_origins == told


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("MRSS_MAX_ROW", "MRSS_MAX_ROWS"),
        ("MRSS_KEY_FILE", "MRSS_KEYS_FILE"),
        ("MRSS_API_KEYS", "MRSS_API_KEY"),
        ("MRSS_SESSION_DIR", "MRSS_SESSIONS_DIR"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_told_with_the_setting(variable, meant):
    env = {variable: "1", meant: "2", "PATH": "/bin", "MRSS": "", "mrss_max_row": ""}
    assert misspelt_variables(env) == {variable: meant}


def test_no_variable_that_we_document_is_taken_for_a_misspelt_one():
    root = Path(__file__).parent.parent
    texts = [path.read_text() for path in [*root.glob("docs/*.md"), *root.glob("deploy/*.y*ml")]]
    documented = set(re.findall(r"\bMRSS_[A-Z_]+\b", "".join(texts)))
    assert {"MRSS_DECODE", "MRSS_ENGINE_KEY", "MRSS_SOCKET"} <= documented
    assert misspelt_variables(dict.fromkeys(documented, "x")) == {}
