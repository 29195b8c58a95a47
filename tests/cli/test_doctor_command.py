import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import mrss
from tiny_model import write_model_folder, write_state

from mrss_provider.cli import doctor, proxy_config
from mrss_provider.cli.output import CommandError
from mrss_provider.cli.proxy_config import examine

HANDLER = "{provider: mrss, custom_handler: mrss_provider.handler}"
PARTS = [
    "python",
    "litellm",
    "torch",
    "device",
    "triton",
    "model",
    "decode",
    "vocabulary",
    "template",
    "states",
]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("doctor")
    states = folder / "states"
    states.mkdir()
    write_state(states / "calm.pth")
    model = write_model_folder(folder / "tiny")
    return ["--model", model, "--states", states, "--device", "cpu", "--threads", "1"]


@pytest.fixture
def _litellm_unimported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_config, "_import_problems", list)


def write_config(path: Path, model: str = "mrss/calm", handlers: str = HANDLER) -> Path:
    path.write_text(
        f"model_list:\n  - model_name: x\n    litellm_params: {{model: '{model}'}}\n"
        f"litellm_settings:\n  custom_provider_map: [{handlers}]\n"
    )
    return path


@pytest.mark.slow
def test_a_sound_installation_ends_with_a_sentence_that_was_generated(
    where: list[object], tmp_path: Path
) -> None:
    # In a process of its own: it imports LiteLLM, whose import warns.
    config = write_config(tmp_path / "proxy_config.yaml")
    command = [sys.executable, "-m", "mrss_provider.cli", "doctor", "--json", "--config", config]
    result = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
    findings = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert [finding["part"] for finding in findings] == [*PARTS, "proxy config", "engine"]
    assert {finding["verdict"] for finding in findings} == {"ok"}
    assert "tokens" in findings[-1]["found"]


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("1.97.9", "FAIL"), ("1.98rc1", "ok"), ("1.98.0.dev2", "ok"), ("2", "ok")],
)
def test_a_version_of_litellm_may_be_one_before_a_release(
    monkeypatch: pytest.MonkeyPatch, version: str, verdict: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    assert doctor._litellm().verdict == verdict


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_missing_model_fails_with_the_reason_and_the_rest_is_told(where: list[object]) -> None:
    result = mrss("doctor", *where[2:], "--model", "/nowhere")
    assert result.code == 1
    assert "FAIL  model: /nowhere does not exist" in result.out
    assert "ok    torch: " in result.out


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_bad_state_is_a_warning(where: list[object], tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    config = write_config(tmp_path / "proxy_config.yaml")
    rest = ["--config", config, "--device", "cpu", "--threads", "1"]
    result = mrss("doctor", "--model", where[1], "--states", tmp_path, *rest)
    assert result.code == 0, result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("warn")]
    assert line.startswith("warn  states: bad: ")
    assert "bad.pth is not a checkpoint" in line


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_configuration_that_is_not_there_is_a_finding_among_the_others(
    where: list[object],
) -> None:
    result = mrss("doctor", *where, "--config", "/nowhere.yaml")
    assert (result.code, result.err) == (1, "")
    assert "FAIL  proxy config: the proxy's configuration /nowhere.yaml does not" in result.out
    assert "\nok    engine: " in result.out


@pytest.mark.usefixtures("_litellm_unimported")
def test_cuda_that_is_not_here_fails(where: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = mrss("doctor", *where[:4], "--device", "cuda")
    assert result.code == 1
    assert "FAIL  device: cuda, asked for by device=cuda, is not here" in result.out


class Card:
    """What torch tells of a machine with CUDA devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: list[object]) -> None:
        self._patch = monkeypatch
        self._where = where
        self.set(is_available=lambda: True, device_count=lambda: 1)
        self.set(get_device_capability=lambda device=None: (9, 0))
        about = SimpleNamespace(name="Card", major=9, minor=0, total_memory=80 << 30)
        about.multi_processor_count = 132
        self.set(get_device_properties=lambda index: about)

    def set(self, **functions: object) -> None:
        for name, function in functions.items():
            self._patch.setattr(f"torch.cuda.{name}", function)

    def findings(self, **settings: object) -> dict[str, doctor.Finding]:
        """Return the findings up to the one about decoding."""
        overrides = {"model": self._where[1], "states": self._where[3], **settings}
        found = doctor._examine(overrides, None)
        return {
            finding.part: finding
            for finding in itertools.takewhile(lambda x: x.part != "vocabulary", found)
        }


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, where: list[object]) -> Card:
    return Card(monkeypatch, where)


def test_the_device_that_was_chosen_is_named_with_the_reason(card: Card) -> None:
    device = card.findings()["device"]
    assert device.line() == "ok    device: cuda, there is one: Card (sm_90, 85.9 GB)"
    card.set(device_count=lambda: 2)
    device = card.findings(device="cuda")["device"]
    assert "asked for by device=cuda, the first of 2 (CUDA_VISIBLE_DEVICES" in device.found


def test_rocm_is_a_warning_and_leaves_the_fused_kernels_out(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.hip", "6.4")
    findings = card.findings(dtype="bf16")
    assert (findings["device"].verdict, findings["decode"].verdict) == ("warn", "warn")
    assert "ROCm is not tested" in findings["device"].remedy
    assert "ROCm 6.4" in findings["device"].found
    assert "never run on ROCm" in findings["decode"].found


def test_the_decode_step_that_a_model_gets_is_told_with_the_reason(
    card: Card, where: list[object]
) -> None:
    fused = card.findings(dtype="fp16", state_dtype="fp16")["decode"]
    assert fused == doctor.Finding(
        "ok", "decode", "fused kernels in CUDA graphs, fp16 weights, fp16 states"
    )
    wide = card.findings(dtype="fp32")["decode"]
    assert (wide.verdict, wide.remedy) == ("warn", "choose --dtype bf16 or fp16")
    assert "the weights are fp32" in wide.found
    small = card.findings(dtype="fp16", quantize="int4")["decode"]
    assert small.found.endswith("fp16 weights, int4 for the large ones, fp32 states")
    card.set(get_device_capability=lambda device=None: (7, 5))
    old = card.findings(dtype="fp16")["decode"]
    assert "compute capability 7.5, the fused kernels need 8.0" in old.found
    cpu = card.findings(device="cpu", dtype="fp32")["decode"]
    assert cpu.line().startswith("ok    decode: layer by layer on the CPU (")


def test_a_model_whose_layers_run_in_one_kernel_is_told(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MRSS_DECODE", raising=False)
    monkeypatch.setattr("mrss_kernels.persistent7_choice.MAX_HELP", {128: 1})
    monkeypatch.setattr("mrss_kernels.persistent7_choice.FASTER", {"Fast": {128: range(1, 9)}})
    monkeypatch.setattr("mrss_kernels.persistent7_cuts.FFN_FACTOR", 2)
    card.set(
        get_device_capability=lambda device=None: (9, 0),
        get_device_name=lambda device=None: "Fast",
    )
    found = card.findings(dtype="fp16")["decode"].found
    assert found.startswith("fused kernels in CUDA graphs, all layers in one for up to 8 rows")
    quantised = card.findings(dtype="fp16", quantize="fp8")["decode"].found
    assert quantised.startswith("fused kernels in CUDA graphs, fp16 weights")
    monkeypatch.setenv("MRSS_DECODE", "fast")
    refused = card.findings(dtype="fp16")["decode"]
    assert refused.verdict == "FAIL"
    assert "MRSS_DECODE must be auto, persistent or launches, got 'fast'" in refused.found


@pytest.mark.usefixtures("_litellm_unimported")
@pytest.mark.parametrize(
    ("model", "handlers", "words"),
    [
        ("mrss/*", HANDLER, None),
        ("openai/gpt-4o", HANDLER, None),
        ("mrss/a+b:0.5~linear", HANDLER, None),
        ("mrss/a", "", "has no provider mrss"),
        ("mrss/a", "{provider: mrss, custom_handler: mrss_provider.provider.handler}", "must be"),
        ("mrss/a+", HANDLER, "bad mixture name 'a+' at position 2"),
        ("mrss/replicated", HANDLER, "LiteLLM would send such requests"),
    ],
)
def test_the_proxys_configuration_is_examined_as_litellm_reads_it(
    tmp_path: Path, model: str, handlers: str, words: str | None
) -> None:
    problems = examine(write_config(tmp_path / "c.yaml", model, handlers))
    assert len(problems) == (words is not None)
    assert words is None or words in problems[0]


@pytest.mark.usefixtures("_litellm_unimported")
@pytest.mark.parametrize(
    ("api_base", "words"),
    [
        ("", None),
        ("http://127.0.0.1:4610/v1", None),
        ("unix:///run/mrss.sock", None),
        ("os.environ/MRSS_UNSET_HERE", None),
        ("127.0.0.1:4610", "unix:///path/to/socket, got '127.0.0.1:4610'"),
        ("9000", "got '9000'"),
        ("unix://run/mrss.sock", "got 'unix://run/mrss.sock'"),
        ("http://me:secret@a:9000", "no user and password"),
        ("os.environ/MRSS_ENGINE_A", "got 'engine-a:9000'"),
    ],
)
@pytest.mark.parametrize("key", ["api_base", "base_url"])
def test_an_address_that_the_first_request_would_fail_at_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, api_base: str, words: str | None
) -> None:
    monkeypatch.setenv("MRSS_ENGINE_A", "engine-a:9000")
    model = f"mrss/*', {key}: '{api_base}"
    problems = examine(write_config(tmp_path / "c.yaml", model))
    assert len(problems) == (words is not None)
    assert words is None or (problems[0].startswith(f"{key} of mrss/*: ") and words in problems[0])


@pytest.mark.usefixtures("_litellm_unimported")
def test_an_address_of_another_provider_is_its_own(tmp_path: Path) -> None:
    model = "ollama/phi', api_base: 'localhost:11434"
    assert examine(write_config(tmp_path / "c.yaml", model)) == []


@pytest.mark.usefixtures("_litellm_unimported")
def test_a_file_that_would_shadow_the_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "mrss_provider.py").touch()
    (problem,) = examine(write_config(tmp_path / "c.yaml"))
    assert "stands beside the configuration" in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is no YAML"),
        ("just words", "no table at its top"),
        ("", "no table at its top"),
        ("litellm_settings: 3", "litellm_settings must be a table, got 3"),
        ("general_settings: [a]", r"general_settings must be a table, got \['a'\]"),
        ("litellm_settings: {custom_provider_map: foo}", "custom_provider_map must be a list of"),
        ("model_list: 4", "model_list must be a list of tables, got 4"),
        ("model_list: [x]", r"model_list must be a list of tables, got \['x'\]"),
        ("model_list: [{litellm_params: x}]", "litellm_params must be a table, got 'x'"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(CommandError, match=words):
        examine(path)


@pytest.mark.usefixtures("_litellm_unimported")
def test_fp16_states_are_taken_from_the_flag_to_the_sentence(where: list[object]) -> None:
    result = mrss("doctor", *where, "--state-dtype", "fp16")
    assert "fp16 states" in result.out
    assert "ok    engine: " in result.out
