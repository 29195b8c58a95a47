"""What fails with the bundled model, on a CPU (slow) and on a CUDA device: a story for each fault.

On CUDA memory is really short, states live on the card, and the engine is a process that held it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from engine_place import ask, read_on
from safetensors.torch import load_file, save_file
from served import served

from mrss_provider.autostart import LocalEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.config import BUNDLED_STATES, DEMO_MODEL, EngineConfig
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.sampling_params import SamplingParams

pytestmark = pytest.mark.timeout(240)

LONG_PROMPT = "The boat is in the harbour, and the lamp is lit. " * 120
# Tokens of an answer that still runs when another request is done.
ANSWER_LEN = {"cpu": 120, "cuda": 3000}
# What cuBLAS keeps for a thread and a stream, whatever is loaded.
WORKSPACE_BYTES = 96 << 20


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def device(request):
    return request.param


def allocated():
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


@pytest.fixture(scope="module")
def begun_with(device):
    """Bytes of the card that were taken before there was a server."""
    return allocated() if device == "cuda" else 0


@pytest.fixture(scope="module")
def server(device, begun_with, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(BUNDLED_STATES, folder / "states")
    hot = load_file(folder / "states/tone.safetensors")
    # Finite as a file must be, and infinite after the first product.
    save_file(
        {name: torch.full_like(tensor, 1e38) for name, tensor in hot.items()},
        folder / "states/hot.safetensors",
    )
    for name in ("first", "second"):
        (folder / "models" / name).mkdir(parents=True)
        for file in ("model.safetensors", "vocab.txt", "card.toml"):
            shutil.copy(DEMO_MODEL / file, folder / "models" / name)
    config = EngineConfig(
        model=folder / "models/first",
        models=folder / "models",
        states=folder / "states",
        device=device,
        threads=1,
        max_rows=8,
        cache_bytes=0,
        cache_device_bytes=0,
        prepare_rows=1,
    )
    with served(folder, config) as found:
        yield found


@contextlib.contextmanager
def full_card():
    """Hold all memory of the card that nobody uses."""
    torch.cuda.empty_cache()
    held = []
    size = 1 << 36
    while size >= 1 << 19:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    yield
    held.clear()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def steps_without_memory(runner):
    """Let every step fail that reads much of a prompt, as one of our kernels' launch may."""
    launch = runner.launch

    def failing(batch):
        if sum(chunk.length for chunk in batch.chunks) > 64:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return launch(batch)

    runner.launch = failing
    yield
    del runner.launch


def no_memory(server, device):
    return full_card() if device == "cuda" else steps_without_memory(server.engine._runner)


def check_shed_or(expected, response):
    """An answer is right, or there was no memory for it, and it says so."""
    if response.status_code != 200:
        assert response.status_code == 503, response.text
        assert response.json()["error"]["code"] == "overloaded"
        return
    assert response.json()["choices"][0]["text"] == expected


def test_without_memory_a_long_prompt_is_shed_and_the_next_request_is_served(server, device):
    expected = server.text()
    # Its kernels are loaded before memory is short.
    expected_long = server.text(prompt=LONG_PROMPT)
    with no_memory(server, device):
        refused = server.post(prompt=LONG_PROMPT)
        beside = server.post()
        # A number of rows that no step had yet, which CUDA captures.
        captured = server.post(model="base", n=5)
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "overloaded"
    check_shed_or(expected, beside)
    server.wait_idle()
    assert server.text() == expected
    assert server.text(prompt=LONG_PROMPT) == expected_long
    check_shed_or(server.text(model="base", n=5), captured)
    server.wait_idle()


def test_without_memory_an_answer_that_runs_goes_on_or_says_that_it_was_shed(server, device):
    answer = {"max_tokens": ANSWER_LEN[device]}
    expected = server.text(**answer)
    with ThreadPoolExecutor() as pool:
        begun = threading.Event()
        older = pool.submit(server.streamed, begun, **answer)
        assert begun.wait(30)
        with no_memory(server, device):
            refused = server.post(model="tone", prompt=LONG_PROMPT)
            text, error = older.result()
    assert refused.status_code == 503, refused.text
    if error:
        assert (device, error["code"]) == ("cuda", "overloaded")
        assert expected.startswith(text)
    else:
        assert text == expected
    server.wait_idle()
    assert server.text(**answer) == expected


def test_numbers_that_are_not_finite_end_their_row_alone(server, device):
    answer = {"max_tokens": ANSWER_LEN[device]}
    expected = server.text(**answer)
    with ThreadPoolExecutor() as pool:
        begun = threading.Event()
        others = pool.submit(server.streamed, begun, **answer)
        assert begun.wait(30)
        bad = server.post(model="hot")
        text, error = others.result()
    assert bad.status_code == 500
    message = bad.json()["error"]["message"]
    assert "not finite" in message
    assert "request 'r" in message
    assert error == {}
    assert text
    server.wait_idle()
    # The slots that held them are clean.
    assert server.text(**answer) == expected


def test_models_that_are_replaced_and_removed_give_their_memory_back(server, device, begun_with):
    expected = server.text()
    server.wait_idle()
    held = []
    for name in ("second", "first", "second"):
        answer = server.http.post("/v1/model", json={"path": name, "drain_s": 5})
        assert answer.status_code == 200, answer.text
        assert server.text() == expected
        server.wait_idle()
        held.append(allocated())
    assert max(held) - min(held) <= 1 << 20
    assert server.http.delete("/v1/model").status_code in (200, 204)
    assert server.http.get("/ready").status_code == 503
    if device == "cuda":
        weights = (DEMO_MODEL / "model.safetensors").stat().st_size
        assert held[-1] - allocated() >= weights
        assert allocated() - begun_with <= WORKSPACE_BYTES
        assert torch.cuda.memory_reserved() - begun_with <= 2 * WORKSPACE_BYTES
    assert server.post().status_code == 503
    assert server.http.post("/v1/model", json={"path": "first"}).status_code == 200
    assert server.text() == expected


LOST = """
import asyncio, torch
from mrss_provider.async_engine import AsyncEngine
from mrss_provider.backend import GenerateRequest
from mrss_provider.config import EngineConfig
from mrss_provider.errors import EngineUnavailableError
from mrss_provider.sampling_params import SamplingParams

async def ask(engine):
    request = GenerateRequest("tone", SamplingParams(max_tokens=8), prompt="Hello")
    stream = await engine.open(request)
    return "".join([delta.text async for delta in stream])

async def main():
    engine = AsyncEngine(EngineConfig(device="cuda", max_rows=4, prepare_rows=1))
    print("text", bool(await ask(engine)))
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
    for _ in range(2):
        try:
            await ask(engine)
        except EngineUnavailableError as exc:
            print("lost", "takes no more work" in str(exc))
    print("told", "takes no more work" in str(await engine.until_lost()))
    await engine.aclose()

asyncio.run(main())
"""


@pytest.mark.gpu
def test_a_card_that_is_lost_ends_the_engine_with_a_clear_error():
    """An access out of bounds: nothing in the process can use the card again."""
    result = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True)
    assert result.stdout.split() == ["text", "True", "lost", "True", "lost", "True", "told", "True"]


def processes_of(folder):
    """Return the engine processes whose socket is in `folder`."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and str(folder) in " ".join(child.cmdline())
    ]


@pytest.fixture
def place():
    # pytest's own folders are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="mrss"))
    yield folder
    for process in processes_of(folder):
        process.kill()
        process.wait(30)
    shutil.rmtree(folder)


def test_a_killed_engine_is_started_again_by_the_next_request(device, place):
    short = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    request = GenerateRequest("knowledge+tone", short, prompt="Hello", timeout_s=120.0)
    endless = GenerateRequest(
        "tone", SamplingParams(max_tokens=20_000, ignore_eos=True), prompt="Hello", timeout_s=120.0
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("MRSS_")}
    env |= {"XDG_RUNTIME_DIR": str(place), "MRSS_DEVICE": device, "MRSS_MAX_ROWS": "8"}
    env |= {"MRSS_PREPARE_ROWS": "1", "MRSS_THREADS": "1", "MRSS_CACHE_BYTES": "0"}

    async def main():
        engine = LocalEngine(env)
        try:
            before = await ask(engine, request)
            stream = await engine.open(endless)
            await anext(stream)
            (process,) = processes_of(place)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailableError, match="broke off"):
                await read_on(stream)
            return before, await ask(engine, request), process.pid
        finally:
            await engine.aclose()

    before, after, pid = asyncio.run(main())
    assert after == before
    assert [process.pid for process in processes_of(place)] not in ([], [pid])
