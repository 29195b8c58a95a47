"""What fails inside the engine ends the requests it concerns with an error, and nothing else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from served import served
from tiny_model import tuned_state

LONG = {"max_tokens": 150}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


def fail_next(monkeypatch, owner, name, failure, when=lambda *arguments: True):
    """Let the next call of a method of `owner` fail for which `when` holds; tell when it has."""
    call = getattr(owner, name)
    failed = threading.Event()

    def failing(*arguments, **options):
        if not failed.is_set() and when(*arguments):
            failed.set()
            raise failure
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return failed


def test_a_defect_of_the_engines_thread_is_told_and_the_next_request_is_served(server, monkeypatch):
    expected = server.text()
    failed = fail_next(monkeypatch, server.engine, "step", ZeroDivisionError("a defect"))
    begun = server.post()
    assert failed.is_set()
    assert begun.status_code == 500
    assert "ZeroDivisionError" in begun.json()["error"]["message"]
    server.wait_idle()
    assert server.text() == expected


def test_a_defect_in_mid_answer_ends_the_stream_with_an_error(server, monkeypatch):
    with ThreadPoolExecutor() as pool:
        begun = threading.Event()
        answer = pool.submit(server.streamed, begun, **LONG)
        assert begun.wait(30)
        fail_next(monkeypatch, server.engine, "step", ZeroDivisionError("a defect"))
        text, error = answer.result()
    assert text
    assert (error["code"], error["status"]) == ("internal_error", 500)
    server.wait_idle()


def test_numbers_that_are_not_finite_end_their_request_and_name_it(tmp_path, server):
    # Finite as a file must be, and infinite after the first product.
    state = {name: 1e38 * tensor.contiguous() for name, tensor in tuned_state(seed=3).items()}
    save_file(state, server.backend.config.states / "hot.safetensors")
    assert server.http.post("/v1/states", json={"path": "hot.safetensors"}).status_code == 201
    expected = server.text(**LONG)
    with ThreadPoolExecutor() as pool:
        begun = threading.Event()
        others = pool.submit(server.streamed, begun, **LONG)
        assert begun.wait(30)
        bad = server.post(model="hot")
        text, error = others.result()
    assert bad.status_code == 500
    message = bad.json()["error"]["message"]
    assert "not finite" in message
    assert "request 'r" in message
    assert (text, error) == (expected, {})
    server.wait_idle()


def test_a_step_without_memory_ends_the_newer_request_and_not_the_older(server, monkeypatch):
    expected = server.text(**LONG)
    no_memory = torch.OutOfMemoryError("CUDA out of memory")
    with ThreadPoolExecutor() as pool:
        begun = threading.Event()
        older = pool.submit(server.streamed, begun, **LONG)
        assert begun.wait(30)
        fail_next(
            monkeypatch,
            server.engine._runner,
            "launch",
            no_memory,
            when=lambda batch: batch.chunks and batch.decoding,
        )
        newer = server.post(model="tone")
        text, error = older.result()
    assert newer.status_code == 503
    assert newer.json()["error"]["code"] == "overloaded"
    assert error == {}
    assert text == expected
    server.wait_idle()


def test_a_defect_of_the_engine_keeps_its_thread(server, monkeypatch):
    """Adding and aborting may fail too: the thread answers and goes on."""
    failed = fail_next(monkeypatch, server.engine, "add", ZeroDivisionError("a defect"))
    refused = server.post()
    assert failed.is_set()
    assert refused.status_code == 500
    assert server.text() == server.text()
