"""The wheel in an environment of its own: what `pip install` gives, far from any checkout."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `env`, where the wheel is installed with the tested set of versions."""
    home = tmp_path_factory.mktemp("far from here")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", home, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True)
    (wheel,) = home.glob("*.whl")
    install = ["-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run([home / "env/bin/python", *install], check=True)
    return home


def run(home: Path, *args: object) -> str:
    """Run a program of the environment in `home` and return its stdout."""
    program = home / "env/bin" / str(args[0])
    result = subprocess.run(
        [program, *map(str, args[1:])],
        cwd=home,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_package_comes_from_the_wheel_with_model_states_and_configuration(home: Path) -> None:
    code = "import mrss_provider, mrss_kernels; print(mrss_provider.__file__)"
    assert Path(run(home, "python", "-c", code).strip()).is_relative_to(home)
    report = run(home, "mrss", "doctor")
    assert [line for line in report.splitlines() if not line.startswith("ok ")] == []
    assert "_bundled/proxy_config.yaml" in report


def test_chat_answers_with_the_bundled_model_and_states(home: Path) -> None:
    asked = ["-m", "Hello!", "--seed", "1", "--max-tokens", "16", "--in-process"]
    base, tone = (run(home, "mrss", "chat", name, *asked) for name in ("base", "tone"))
    assert base.strip()
    assert tone.strip()
    assert base != tone


def test_serve_answers_until_it_is_told_to_leave(home: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        server = subprocess.Popen(
            [home / "env/bin/mrss", "serve", "--socket", f"{short}/s"],
            cwd=home,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        assert any(line.startswith("names: mrss/base") for line in server.stderr)
        answer = run(home, "mrss", "chat", "-m", "Hello!", "--server", f"unix://{short}/s")
        assert answer.strip()
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        assert server.returncode == 0
