"""The files of deploy/: each by its own linter where there is one, and held to this package."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from command import mrss

from mrss_provider.cli.proxy_config import examine
from mrss_provider.config import EngineConfig, ServerConfig

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """Return the Dockerfile's (instruction, arguments), continued lines joined."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    pairs = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    return [(name, text.strip()) for name, text in pairs]


def last(name):
    return [text for instruction, text in instructions() if instruction == name][-1]


def read_yaml(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def unit():
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(DEPLOY / "mrss.service")
    return parser


def env_file(name):
    lines = (DEPLOY / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def default_of(name):
    for cls in (EngineConfig, ServerConfig):
        if name in cls.__dataclass_fields__:
            return cls.__dataclass_fields__[name].default
    raise AssertionError(f"no setting {name}")


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or pytest.skip("absent")
    result = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_dockerfile_copies_what_is_there_and_nothing_else_is_sent():
    copied = []
    for name, text in instructions():
        if name == "COPY" and not text.startswith("--from"):
            copied += text.split()[:-1]
    assert all((ROOT / path).exists() for path in copied)
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert {line[1:] for line in sent if line.startswith("!")} == set(copied)
    # What hatch_build.py puts into the wheel is among it.
    assert {"models/demo", "states", "proxy_config.yaml", "hatch_build.py"} <= set(copied)


def test_image_is_of_a_python_that_is_supported_and_runs_as_nobody_special():
    (python,) = [text.removeprefix("PYTHON=") for _, text in instructions() if "PYTHON=" in text]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert int(last("USER")) >= 1000
    stages = [text.split()[-1] for name, text in instructions() if name == "FROM"]
    assert stages == ["build", "cpu", "cuda", "${VARIANT}"]


def test_image_serves_where_its_health_is_asked_for():
    command = [*yaml.safe_load(last("ENTRYPOINT")), *yaml.safe_load(last("CMD"))]
    assert command[0] in PROJECT["scripts"]
    assert command[1:] == ["serve", "--host", "0.0.0.0"]
    assert int(last("EXPOSE")) == default_of("port")
    assert f"127.0.0.1:{default_of('port')}/ready" in last("HEALTHCHECK")


COMMANDS = [yaml.safe_load(last("CMD")), shlex.split(unit()["Service"]["ExecStart"])[1:]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=["Dockerfile", "mrss.service"])
def test_command_lines_are_ours(arguments):
    # `--help` last: everything before it is parsed, nothing is served.
    result = mrss(*arguments, "--help")
    assert result.code == 0, result.err


def test_environment_file_sets_what_exists():
    for key in re.findall(r"MRSS_\w+(?==)", (DEPLOY / "mrss.env").read_text()):
        if key not in {"MRSS_API_KEY", "MRSS_ADMIN_KEY"}:
            default_of(key.removeprefix("MRSS_").lower())
    EngineConfig.from_env(env=env_file("mrss.env"))
    ServerConfig.from_env(env=env_file("mrss.env"))


def test_stopping_takes_longer_than_draining():
    drain_s = float(env_file("mrss.env")["MRSS_DRAIN_S"])
    assert float(unit()["Service"]["TimeoutStopSec"]) > drain_s
    engine = read_yaml("compose.yaml")["x-engine"]
    assert float(engine["stop_grace_period"].rstrip("s")) > float(
        engine["environment"]["MRSS_DRAIN_S"]
    )


def test_unit_restarts_on_failure_and_reads_the_environment_file():
    service = unit()["Service"]
    assert service["Restart"] == "on-failure"
    assert service["EnvironmentFile"] == "/etc/mrss/mrss.env"
    assert (DEPLOY / Path(service["EnvironmentFile"]).name).is_file()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path):
    text = (DEPLOY / "mrss.service").read_text()
    # The one thing that is not on this machine.
    text = text.replace("/opt/mrss/bin/mrss", str(Path(sys.executable).parent / "mrss"))
    path = tmp_path / "mrss.service"
    path.write_text(text)
    verify = ["systemd-analyze", "verify", "--man=no", path]
    result = subprocess.run(verify, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    # In tenths: systemd calls up to 2.4 of 10 as good as sealed.
    secure = ["systemd-analyze", "security", "--offline=true", "--threshold=24", path]
    result = subprocess.run(secure, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-200:]


def test_compose_names_files_and_services_that_exist():
    compose = read_yaml("compose.yaml")
    services = compose["services"]
    for service in services.values():
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists()
    assert set(read_yaml("compose.cuda.yaml")["services"]) <= set(services)


def test_compose_sets_every_secret_and_what_the_proxy_reads():
    text = (DEPLOY / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(env_file("example.env"))
    config = (DEPLOY / "proxy_config.yaml").read_text()
    read = set(re.findall(r"os\.environ/(\w+)", config))
    services = read_yaml("compose.yaml")["services"]
    assert set(services["proxy"]["environment"]) == read
    for name in ("A", "B"):
        address = services["proxy"]["environment"][f"MRSS_ENGINE_{name}"]
        host, port = address.removeprefix("http://").split(":")
        assert host in services
        assert int(port) == default_of("port")


def test_only_the_proxy_is_published_and_on_loopback():
    services = read_yaml("compose.yaml")["services"]
    published = {name: s["ports"] for name, s in services.items() if "ports" in s}
    assert published == {"proxy": ["127.0.0.1:4000:4000"]}


def test_proxy_configuration_has_each_name_at_each_engine():
    entries = read_yaml("proxy_config.yaml")["model_list"]
    engines = {}
    for entry in entries:
        params = entry["litellm_params"]
        assert params["model"] == entry["model_name"]
        engines.setdefault(entry["model_name"], []).append(params["api_base"])
    both = ["os.environ/MRSS_ENGINE_A", "os.environ/MRSS_ENGINE_B"]
    assert engines == dict.fromkeys(engines, both)
    ids = [entry["model_info"]["id"] for entry in entries]
    assert len(set(ids)) == len(ids)
    assert examine(DEPLOY / "proxy_config.yaml") == []
