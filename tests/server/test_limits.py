"""What a key may use: places and tokens, reserved and settled. Oracle: a clock that we turn."""

import contextlib
import threading

import pytest
from fakes import PROMPT_TOKENS, FakeBackend, Wait, text
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from mrss_provider.backend import GenerateRequest, Message
from mrss_provider.config import ServerConfig
from mrss_provider.errors import RateLimitError
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.server.app import create_app
from mrss_provider.server.auth import Caller, KeyRing
from mrss_provider.server.keys import Key, Limits, hash_of
from mrss_provider.server.limits import Allowance, limited, num_tokens_of

KEYS = {"small": "key-of-small-01234", "other": "key-of-other-01234"}


def client_of(backend, limits, **config) -> TestClient:
    keys = [
        Key("small", hash_of(KEYS["small"]), "user", limits),
        Key("other", hash_of(KEYS["other"]), "user"),
    ]
    app = create_app(backend, ServerConfig(**config), keys=KeyRing(fixed=keys))
    return TestClient(app, base_url="http://127.0.0.1:9000")


def ask(client, who="small", **more):
    body = {"model": "tone", "messages": [{"role": "user", "content": "hi"}], **more}
    headers = {"authorization": f"Bearer {KEYS[who]}"}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def request_of(**sampling) -> GenerateRequest:
    return GenerateRequest(
        model="tone", sampling=SamplingParams(**sampling), messages=(Message("user", "x" * 40),)
    )


def test_one_key_does_not_take_more_places_than_it_has():
    wait = Wait()
    backend = FakeBackend(lambda asked: [wait] if asked.owner == "small" else [text("x")])
    with client_of(backend, Limits(max_concurrent=1)) as client:
        first = threading.Thread(target=ask, args=(client,))
        first.start()
        assert wait.reached.wait(10)
        refused = ask(client)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-limit-requests"] == "1"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert ask(client, "other").status_code == 200
        wait.go.set()
        first.join()
        assert ask(client).status_code == 200


def test_a_refused_request_keeps_no_place_and_no_tokens():
    backend = FakeBackend()
    limits = Limits(max_concurrent=1, tokens_per_minute=10_000)
    with client_of(backend, limits) as client:
        for _ in range(3):
            assert ask(client, model="unknown").status_code == 400
        answered = ask(client)
    assert answered.status_code == 200
    # The whole minute's worth was there when it came; its 1024 tokens and prompt are reserved.
    assert int(answered.headers["x-ratelimit-remaining-tokens"]) >= 10_000 - 1024 - 10


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_were_not_used_come_back(stream):
    with client_of(FakeBackend(), Limits(tokens_per_minute=1100)) as client:
        left = [
            int(ask(client, stream=stream).headers["x-ratelimit-remaining-tokens"])
            for _ in range(3)
        ]
    # Three answers of three tokens each: what is left differs by what was used.
    used = PROMPT_TOKENS + 3
    assert left[0] - left[1] <= used
    assert left[1] - left[2] <= used


def test_who_has_used_its_tokens_is_told_when_to_come_back():
    now = [0.0]
    allowance = Allowance(clock=lambda: now[0])
    limits = Limits(tokens_per_minute=600)
    with allowance.taken(limits, 600) as reservation:
        reservation.num_used = 600
    words = "600 tokens a minute and has 0 left"
    with pytest.raises(RateLimitError, match=words) as caught, allowance.taken(limits, 100):
        pytest.fail("it has none")
    assert caught.value.retry_after_s == pytest.approx(10.0)
    assert caught.value.headers["x-ratelimit-remaining-tokens"] == "0"
    assert caught.value.headers["x-ratelimit-reset-tokens"] == "60s"
    now[0] += 10.0
    with allowance.taken(limits, 100):
        pass


def test_more_than_a_minutes_worth_is_paid_back():
    now = [0.0]
    allowance = Allowance(clock=lambda: now[0])
    limits = Limits(tokens_per_minute=60)
    with allowance.taken(limits, 1000) as reservation:
        reservation.num_used = 600
    now[0] += 539.0
    with pytest.raises(RateLimitError), allowance.taken(limits, 1):
        pytest.fail("it is in debt")
    now[0] += 3.0
    with allowance.taken(limits, 1):
        pass


@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=60
    )
)
def test_on_average_nobody_gets_more_than_the_rate(calls):
    now, used = [0.0], 0
    allowance = Allowance(clock=lambda: now[0])
    limits = Limits(tokens_per_minute=120)
    for pause, asked, share in calls:
        now[0] += pause
        try:
            with allowance.taken(limits, asked) as reservation:
                reservation.num_used = int(asked * share)
                used += reservation.num_used
        except RateLimitError:
            continue
        # A minute's worth at the start, the rate since, and one request that was larger.
        assert used <= 120 + 2 * now[0] + 300


def test_a_change_of_the_rate_gives_one_minutes_worth_and_no_more():
    allowance = Allowance(clock=lambda: 0.0)
    before, after = Limits(tokens_per_minute=600), Limits(tokens_per_minute=60)
    old = [contextlib.ExitStack() for _ in range(3)]
    for request in old:
        request.enter_context(allowance.taken(before, 100)).num_used = 100
    with allowance.taken(after, 60) as reservation:
        reservation.num_used = 60
    # They end one after the other, and the key asks for more in between.
    for request in old:
        request.close()
        with pytest.raises(RateLimitError), allowance.taken(after, 60):
            pass


def test_what_a_request_may_use_is_its_prompt_and_every_answer():
    asked = limited(request_of(max_tokens=50), Caller(), ServerConfig())
    assert num_tokens_of([asked, asked]) == 2 * (10 + 50)
    unsaid = limited(request_of(), Caller(), ServerConfig(max_answer_len=30))
    assert num_tokens_of([unsaid]) == 10 + 30


@pytest.mark.parametrize(
    ("of_key", "of_server", "result"), [(0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (9, 7, 7)]
)
def test_the_lower_limit_holds(of_key, of_server, result):
    caller = Caller("a", limits=Limits(max_prompt_len=of_key, max_answer_len=of_key))
    config = ServerConfig(max_prompt_len=of_server, max_answer_len=of_server)
    asked = limited(request_of(), caller, config)
    assert (asked.max_prompt_len, asked.max_answer_len) == (result, result)
    assert asked.owner == "a"
