"""What a server counts, and how it tells. Oracle: prometheus_client's own parser."""

import pytest
from fakes import PROMPT_TOKENS, ROWS, FakeBackend, Wait, text
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from mrss_provider.backend import CacheStats, Delta, EngineStats, StreamInfo, Usage
from mrss_provider.config import ServerConfig
from mrss_provider.errors import QueueFullError
from mrss_provider.server.app import create_app
from mrss_provider.server.metrics import MAX_MIXTURES, OTHER, Histogram, Metrics

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
INFO = StreamInfo("tone", ROWS, "f", PROMPT_TOKENS)
STATS = EngineStats(
    num_waiting=2,
    num_running=3,
    num_rows=9,
    num_free_rows=55,
    num_steps=1000,
    num_prompt_tokens=200,
    num_sampled_tokens=300,
    cache=CacheStats(4, 5, 600, 7, 800, 900, 1000),
    device_bytes=11,
    device_bytes_total=12,
)


class Observed(FakeBackend):
    def stats(self):
        return STATS


def client_of(backend, **config) -> TestClient:
    app = create_app(backend, ServerConfig(**config), model="demo")
    return TestClient(app, base_url="http://127.0.0.1:9000", raise_server_exceptions=False)


def samples(client) -> dict[tuple[str, ...], float]:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_counted(stream):
    with client_of(FakeBackend()) as client:
        client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        client.post("/chat/completions", json={**CHAT, "stream": stream})
        client.get("/v1/models/tone")
        client.get("/no/such/page")
        told = samples(client)
    assert told["mrss_http_requests_total", "/v1/chat/completions", "200"] == 2
    assert told["mrss_http_requests_total", "/v1/models/{id:path}", "200"] == 1
    assert told["mrss_http_requests_total", "none", "404"] == 1
    assert told["mrss_answers_total", "stop"] == 2
    assert told["mrss_tokens_total", "prompt"] == 2 * PROMPT_TOKENS
    assert told["mrss_tokens_total", "completion"] == 2 * 3
    assert told["mrss_time_to_first_token_seconds_count",] == 2
    assert told["mrss_inter_token_seconds_count",] == 2 * 2
    assert told["mrss_answer_seconds_count",] == 2
    assert told["mrss_mixture_rows", "tone"] == 0


def test_errors_are_counted_by_what_they_are():
    with client_of(FakeBackend(open_error=QueueFullError("full"))) as client:
        client.post("/v1/chat/completions", json=CHAT)
        told = samples(client)
    assert told["mrss_answers_total", "queue_full"] == 1
    assert told["mrss_http_requests_total", "/v1/chat/completions", "429"] == 1
    assert told["mrss_answer_seconds_count",] == 0


def test_a_defect_is_counted_as_one():
    with client_of(FakeBackend(open_error=RuntimeError("bang"))) as client:
        client.post("/v1/chat/completions", json=CHAT)
        told = samples(client)
    assert told["mrss_answers_total", "internal_error"] == 1
    assert told["mrss_http_requests_total", "/v1/chat/completions", "500"] == 1


def test_rows_are_told_while_they_are_held():
    wait = Wait()
    with client_of(FakeBackend([text("a"), wait, text("b")])) as client:
        import threading

        asking = threading.Thread(
            target=client.post, args=("/v1/chat/completions",), kwargs={"json": {**CHAT, "n": 2}}
        )
        asking.start()
        assert wait.reached.wait(10)
        assert samples(client)["mrss_mixture_rows", "tone"] == 2 * ROWS
        wait.go.set()
        asking.join()
        assert samples(client)["mrss_mixture_rows", "tone"] == 0


def test_an_engine_tells_its_own_numbers():
    with client_of(Observed()) as client:
        told = samples(client)
    expected = {
        ("mrss_requests_waiting",): 2,
        ("mrss_requests_running",): 3,
        ("mrss_rows_used",): 9,
        ("mrss_rows_free",): 55,
        ("mrss_steps_total",): 1000,
        ("mrss_tokens_sampled_total",): 300,
        ("mrss_cache_hits_total",): 4,
        ("mrss_cache_misses_total",): 5,
        ("mrss_cache_hit_tokens_total",): 600,
        ("mrss_cache_bytes", "device"): 800,
        ("mrss_cache_bytes", "ram"): 900,
        ("mrss_cache_bytes", "disk"): 1000,
        ("mrss_device_bytes",): 11,
        ("mrss_device_total_bytes",): 12,
    }
    assert expected.items() <= told.items()
    assert any(name[0] == "mrss_build_info" and "demo" in name for name in told)
    assert told["process_resident_memory_bytes",] > 0


def test_a_histogram_counts_each_value_once_at_or_below_its_bound():
    histogram = Histogram((1.0, 2.0))
    histogram.add(0.5)
    histogram.add(1.0)
    histogram.add(1.5, 3)
    histogram.add(9.0)
    assert histogram.counts == [2, 3, 1]
    assert histogram.total == pytest.approx(0.5 + 1.0 + 4.5 + 9.0)


def test_tokens_that_come_together_are_as_many_gaps():
    now = [0.0]
    metrics = Metrics(clock=lambda: now[0])
    with metrics.answer() as meter:
        meter.admit(INFO, 1, "id")
        now[0] = 0.25
        meter.add(Delta(text="a", num_tokens=1))
        now[0] = 0.55
        meter.add(Delta(text="bcd", num_tokens=3))
        meter.add(Delta(finish_reason="stop"))
        meter.add(Delta(usage=Usage(PROMPT_TOKENS, 4)))
    assert (sum(metrics.first.counts), metrics.first.total) == (1, 0.25)
    assert sum(metrics.gap.counts) == 3
    assert metrics.gap.total == pytest.approx(0.3)
    assert metrics.usage.completion_tokens == 4
    assert metrics.ends == {"stop": 1}


def test_a_client_that_left_is_counted_with_what_it_got():
    metrics = Metrics()
    with metrics.answer() as meter:
        meter.admit(INFO, 1, "id")
        meter.add(Delta(text="a", num_tokens=1))
    assert metrics.ends == {"gone": 1}
    assert (metrics.usage.prompt_tokens, metrics.usage.completion_tokens) == (PROMPT_TOKENS, 1)


def test_labels_are_bounded_whatever_callers_type():
    metrics = Metrics()
    for _ in range(50):
        metrics.use("favourite")
    for number in range(5000):
        metrics.use(f"mixture-{number}")
        metrics.use("favourite")
    metrics.rows["favourite"] = 4
    metrics.rows["mixture-0"] = 2
    rows = metrics.rows_by_mixture()
    assert len(rows) == MAX_MIXTURES + 1
    assert rows["favourite"] == 4
    assert rows[OTHER] == 2
    assert sum(rows.values()) == 6
