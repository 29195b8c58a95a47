"""The playground's page in Chromium, in front of a scripted backend."""

import statistics
import time

import pytest
from fakes import FakeBackend, Wait, serving, text, traced
from page_actions import QUESTION, answer_of, ask, pane, slide
from ports import free_port

from mrss_provider.config import ServerConfig

MAX_LAG_MS = 200
HOSTILE = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"
slow = pytest.mark.slow


def faked(backend, **config):
    config = ServerConfig(port=free_port(), **config)
    return serving(backend, config), f"http://127.0.0.1:{config.port}/"


def test_a_prompt_is_answered_in_every_pane(new_page, expect):
    backend = FakeBackend([traced("Ahoy"), traced(" there", "base", disagreement=0.0)])
    server, url = faked(backend)
    with server:
        page = new_page(url)
        ask(page, expect)
        assert [answer_of(page, i) for i in (1, 2)] == ["Ahoy there"] * 2
        assert pane(page, 1).locator(".token").all_text_contents() == ["Ahoy", "there"]
        asked = {request.model: request for request in backend.requests}
        assert set(asked) == {"knowledge+tone", "base"}
        assert asked["base"].messages[0].content == QUESTION


@slow
def test_settings_wait_for_the_set_up_that_they_change(new_page, expect):
    server, url = faked(FakeBackend([text("Ahoy")]))
    with server:
        page = new_page()
        held, released = [], []
        page.route(
            "**/v1/models*", lambda route: route.continue_() if released else held.append(route)
        )
        # Else the settings could be looked at before there is a request to hold.
        with page.expect_request("**/v1/models*"):
            page.goto(url)
        heat_map = page.get_by_label("Heat map")
        expect(heat_map).to_be_disabled()
        released.append(True)
        while held:
            held.pop().continue_()
        expect(heat_map).to_be_checked()
        heat_map.set_checked(False)


@slow
def test_hostile_text_stays_text(new_page, expect):
    backend = FakeBackend([traced(HOSTILE), traced(f"\n{HOSTILE}", "base")])
    server, url = faked(backend)
    with server:
        page = new_page(url)
        heat_map = page.get_by_label("Heat map")
        expect(heat_map).to_be_enabled()
        for is_traced in (True, False):
            heat_map.set_checked(is_traced)
            ask(page, expect, HOSTILE)
            assert answer_of(page, 1) == f"{HOSTILE}\n{HOSTILE}"
        pane(page, 1).locator(".token").first.hover()
        expect(pane(page, 1).locator(".inspector")).to_contain_text("<script>")
        backend.open_error = RuntimeError(HOSTILE)
        pane(page, 1).get_by_label("Weight of tone").press("ArrowLeft")
        expect(pane(page, 1).locator(".error").last).to_contain_text("a defect of the engine")
        assert page.evaluate("window.hit") is None
        assert page.locator("main img, main script").count() == 0


@slow
def test_a_broken_stream_and_a_refusal_say_so_and_keep_the_text(new_page, expect):
    backend = FakeBackend([text("Half an"), RuntimeError("defect")])
    server, url = faked(backend)
    with server:
        page = new_page(url)
        page.get_by_label("Prompt for all panes").fill("hi")
        page.keyboard.press("Enter")
        expect(pane(page, 1).locator(".error")).to_contain_text("defect of the engine")
        assert answer_of(page, 1) == "Half an"
        page.get_by_label("Top p").fill("0.001")
        page.get_by_label("Temperature").fill("101")
        page.get_by_label("Temperature").press("Tab")
        assert not page.get_by_label("Temperature").evaluate("e => e.validity.valid")
        assert len(backend.requests) <= 4


@slow
def test_a_slider_ends_the_old_stream_and_asks_once_when_it_rests(new_page, expect):
    backend = FakeBackend(lambda request: [text("begun"), Wait()])
    server, url = faked(backend)
    with server:
        page = new_page(url)
        page.get_by_label("Prompt for all panes").fill("hi")
        page.keyboard.press("Enter")
        expect(page.get_by_text("begun")).to_have_count(2)
        streams = list(backend.streams)
        slide(page, 1, "tone", 0.9, 0.6, 0.35)
        expect(pane(page, 1).locator(".pane-name")).to_have_text("knowledge+tone:0.35")
        expect(page.get_by_text("begun")).to_have_count(2)
        while len(backend.requests) < 3:
            page.wait_for_timeout(20)
        assert backend.requests[2].mixture.weights == {"knowledge": 1, "tone": 0.35}
        ended = {r.model: s for r, s in zip(backend.requests, streams, strict=False)}
        assert ended["knowledge+tone"].ended.wait(5)
        assert ended["knowledge+tone"].aborted
        assert not ended["base"].ended.is_set()
        page.get_by_role("button", name="Stop").click()
        assert ended["base"].ended.wait(5)
        expect(pane(page, 2).locator(".foot")).to_contain_text("stopped")
        assert len(backend.requests) == 3


@slow
def test_each_pane_goes_on_with_its_own_answers(new_page, expect):
    backend = FakeBackend(lambda request: [text(f"I am {request.model}")])
    server, url = faked(backend)
    with server:
        page = new_page(url)
        ask(page, expect, "one")
        page.get_by_role("button", name="Add pane").click()
        expect(page.locator(".pane")).to_have_count(3)
        expect(pane(page, 3).locator(".answer")).to_have_attribute("data-state", "done")
        ask(page, expect, "two", panes=3)
        said = {r.model: [m.content for m in r.messages] for r in backend.requests[-3:]}
        for model in ("knowledge+tone", "base"):
            assert said[model] == ["one", f"I am {model}", "two"]
        page.get_by_role("button", name="Remove pane 3").click()
        expect(page.locator(".pane")).to_have_count(2)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".turn")).to_have_count(0)


SEE_TOKEN = """() => {
  window.seen = 0;
  const look = () => {
    const texts = [...document.querySelectorAll('.turn:last-child .text')];
    if (!window.seen && texts.some((text) => text.textContent)) window.seen = Date.now();
  };
  const what = { subtree: true, childList: true, characterData: true };
  new MutationObserver(look).observe(document.getElementById('panes'), what);
}"""


@slow
def test_the_first_token_is_on_the_page_soon_after_the_server_has_it(new_page, expect):
    waits = []

    def script(request):
        waits.append(Wait())
        return [waits[-1], traced("first"), traced(" second")]

    server, url = faked(FakeBackend(script))
    lags_ms = []
    with server:
        page = new_page(url)
        for _ in range(5):
            waits.clear()
            page.get_by_label("Prompt for all panes").fill("hi")
            page.keyboard.press("Enter")
            while len(waits) < 2 or not all(wait.reached.is_set() for wait in waits):
                page.wait_for_timeout(10)
            page.evaluate(SEE_TOKEN)
            left = time.time()
            for wait in waits:
                wait.go.set()
            expect(page.locator(".turn:last-child .answer[data-state=done]")).to_have_count(2)
            lags_ms.append(page.evaluate("window.seen") - 1e3 * left)
    # The page's clock has whole milliseconds.
    assert -1 <= statistics.median(lags_ms) < MAX_LAG_MS
