"""The playground's page in Chromium, in front of a real `mrss serve`."""

import json
import re
import subprocess
import sys

import httpx
import pytest
from page_actions import QUESTION, answer_of, ask, pane, slide
from ports import free_port
from processes import Process, Served

pytestmark = pytest.mark.slow

KEYS = {"MRSS_API_KEY": "user-0123456789abcdef", "MRSS_ADMIN_KEY": "admin-0123456789abcdef"}


def stored(page):
    return page.evaluate("JSON.stringify(localStorage)")


def test_a_state_speaks_where_its_slider_says_and_the_trace_tells(new_page, expect, served):
    page = new_page(served.url)
    ask(page, expect)
    first = pane(page, 1)
    tokens = first.locator(".token")
    tokens.nth(4).hover()
    inspector = first.locator(".inspector")
    expect(inspector).to_contain_text("would say")
    assert re.search(r"(knowledge|tone|base) spoke|all agree", inspector.inner_text())
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(inspector).to_contain_text("token 2 of")
    before = inspector.locator(".likeliest").inner_text(), answer_of(page, 1)
    other = answer_of(page, 2)

    slide(page, 1, "tone", 0)
    expect(first.locator(".pane-name")).to_have_text("knowledge")
    expect(first.locator(".answer .text")).not_to_have_text(before[1])
    expect(first.locator(".answer")).to_have_attribute("data-state", "done")
    tokens.nth(1).focus()
    expect(inspector).to_be_visible()
    assert inspector.locator(".likeliest").inner_text() != before[0]
    assert answer_of(page, 2) == other
    slide(page, 1, "tone", 1)
    expect(first.locator(".answer .text")).to_have_text(before[1])

    first.get_by_label("merge").select_option("power")
    first.get_by_label("exponent").first.fill("-1")
    first.get_by_label("gate").select_option("fixed")
    expect(first.locator(".pane-name")).to_have_text("knowledge+tone~power:-1~fixed")
    expect(first.locator(".answer")).to_have_attribute("data-state", "done")


def test_a_mixture_is_saved_by_name_and_a_refusal_is_told(new_page, expect, served):
    page = new_page(served.url)
    slide(page, 1, "tone", 0.5)
    pane(page, 1).get_by_role("button", name="Save").click()
    page.get_by_label("Name", exact=True).fill("knowledge")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(page.locator("#save-error")).to_contain_text("knowledge")
    page.get_by_label("Name", exact=True).fill("from-the-page")
    page.get_by_label("Description").fill("Half a pirate.")
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_contain_text("Saved: ask for mrss/from-the-page")
    saved = httpx.get(f"{served.url}v1/mixtures/from-the-page", trust_env=False).json()
    assert (saved["terms"], saved["description"]) == ("knowledge+tone:0.5", "Half a pirate.")
    pane(page, 2).get_by_label("load a named mixture").select_option("mixture from-the-page")
    expect(pane(page, 2).locator(".pane-name")).to_have_text("knowledge+tone:0.5")


def test_a_blind_vote_tells_nothing_before_it_is_cast_and_is_counted(new_page, expect, served):
    page = new_page(served.url)
    ask(page, expect)
    page.get_by_label("Blind vote").check()
    ask(page, expect, "Where is the mill?")
    expect(page.get_by_role("heading", name="Which answer is best?")).to_be_visible()
    shown = page.locator("main").inner_text()
    assert "knowledge" not in shown
    # Nor what the panes said when one could see which they are.
    assert "lighthouse" not in shown
    for telling in (".token", ".foot span", ".slider", ".inspector"):
        assert page.locator(f"{telling}:visible").count() == 0
    assert page.locator(".pane-name").all_text_contents() == ["Answer A", "Answer B"]
    page.get_by_role("button", name="Answer B").click()
    expect(page.locator("#vote-result")).to_contain_text("Your vote is counted")
    names = page.locator(".pane-name").all_text_contents()
    assert sorted(names) == ["base", "knowledge+tone"]
    (line,) = [json.loads(line) for line in served.feedback.read_text().splitlines()]
    assert (line["vote"], line["models"]) == ("b", names)
    assert page.locator(".token").count() > 0


def test_a_reload_and_a_link_bring_the_set_up_back(new_page, expect, served):
    page = new_page(served.url)
    slide(page, 1, "tone", 0.35)
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed", exact=True).fill("99")
    page.get_by_role("button", name="Add pane").click()
    page.get_by_label("Prompt for all panes").fill("Who are you?")

    def shown(page):
        expect(page.locator(".pane")).to_have_count(3)
        fields = [page.get_by_label("Temperature"), page.get_by_label("Seed", exact=True)]
        values = [field.input_value() for field in [*fields, page.locator("#prompt")]]
        return [*values, *page.locator(".pane-name").all_text_contents()]

    before = shown(page)
    assert before == ["0.7", "99", "Who are you?", "knowledge+tone:0.35", "base", "base"]
    page.reload()
    assert shown(page) == before
    # Where the clipboard is not to be had, the link stands in the address bar.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#toast")).to_contain_text("address bar")
    other = new_page(page.url)
    assert shown(other) == before
    assert "#" not in other.url
    broken = new_page(f"{served.url}#setup=e30")
    expect(broken.locator("#toast")).to_contain_text("cannot be read")
    expect(broken.locator(".pane")).to_have_count(2)


@pytest.mark.timeout(300)
def test_a_server_that_is_killed_is_told_and_taken_up_again(new_page, expect, tmp_path):
    server = Served(tmp_path)
    server.start()
    try:
        page = new_page(server.url)
        ask(page, expect)
        answers = [answer_of(page, i) for i in (1, 2)]
        server.kill()
        slide(page, 1, "tone", 0.5)
        banner = page.locator("#gone")
        expect(banner).to_contain_text("The server does not answer")
        expect(pane(page, 1).locator(".error").last).to_contain_text("does not answer")
        assert [pane(page, i).locator(".text").first.text_content() for i in (1, 2)] == answers
        server.start()
        expect(banner).to_be_hidden()
        expect(pane(page, 1).locator(".answer")).to_have_count(1)
        expect(pane(page, 1).locator(".answer")).to_have_attribute("data-state", "done")
        expect(pane(page, 1).locator(".error")).to_be_empty()
        slide(page, 1, "tone", 1)
        expect(pane(page, 1).locator(".answer .text")).to_have_text(answers[0])
        ask(page, expect, "And the mill?")
    finally:
        server.kill()


def test_a_key_is_asked_for_and_stays_in_the_tab(new_page, expect, tmp_path):
    server = Served(tmp_path, KEYS)
    server.start()
    try:
        page = new_page(server.url)
        dialog = page.get_by_role("dialog", name="This server wants an API key")
        expect(dialog).to_be_visible()
        for key in ("wrong-0123456789abcdef", KEYS["MRSS_API_KEY"]):
            dialog.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            if key.startswith("wrong"):
                expect(dialog.get_by_role("alert")).to_contain_text("not known here")
        expect(page.locator(".pane")).to_have_count(2)
        ask(page, expect)
        pane(page, 1).get_by_role("button", name="Save").click()
        page.get_by_label("Name", exact=True).fill("not-mine")
        page.keyboard.press("Enter")
        expect(page.locator("#save-error")).to_contain_text("use an admin key")
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        pane(page, 1).get_by_role("button", name="Copy").click()
        assert "$MRSS_API_KEY" in page.locator("#copy-text").inner_text()
        with page.expect_download() as download:
            page.get_by_role("dialog").get_by_role("button", name="Close").click()
            page.get_by_role("button", name="Export").click()
        exported = download.value.path().read_text()
        for place in (stored(page), exported, page.url, page.locator("body").inner_html()):
            assert KEYS["MRSS_API_KEY"] not in place
        page.reload()
        expect(page.locator(".pane")).to_have_count(2)
        expect(dialog).to_be_hidden()
    finally:
        server.kill()


def test_the_export_holds_what_was_said(new_page, expect, served):
    page = new_page(served.url)
    ask(page, expect)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(download.value.path().read_text())
    assert exported["prompts"] == [QUESTION]
    (answer,) = exported["panes"][0]["answers"]
    assert answer["text"] == answer_of(page, 1)
    assert {"who", "weights", "r", "would_say"} <= set(answer["tokens"][0]["trace"])


@pytest.mark.timeout(300)
def test_what_is_copied_runs_and_says_the_same(new_page, expect, served, tmp_path):
    page = new_page(served.url)
    slide(page, 1, "tone", 0.6)
    page.get_by_label("Temperature").fill("0.4")
    page.get_by_label("Temperature").press("Tab")
    ask(page, expect)
    said = answer_of(page, 1)
    pane(page, 1).get_by_role("button", name="Copy").click()

    def copied(form):
        page.get_by_role("dialog").get_by_role("button", name=form, exact=True).click()
        return page.locator("#copy-text").text_content()

    def ran(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    got = json.loads(ran("bash", "-c", copied("curl")))
    assert got["choices"][0]["message"]["content"] == said
    assert ran(sys.executable, "-c", copied("Python")) == f"{said}\n"

    (tmp_path / "config.yaml").write_text(copied("Proxy YAML"))
    port = free_port()
    command = [sys.executable, "-c", "from litellm import run_server; run_server()"]
    command += ["--config", str(tmp_path / "config.yaml"), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--telemetry", "False"]
    proxy = Process(command, "Application startup complete", {"COLUMNS": "200"})
    try:
        body = {"model": "playground", "messages": [{"role": "user", "content": QUESTION}]}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=60, trust_env=False)
        assert answer.json()["choices"][0]["message"]["content"] == said
    finally:
        proxy.end()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_serious_to_axe_nor_wider_than_the_window(
    new_page, expect, served, width, scheme
):
    axe_core = pytest.importorskip("axe_playwright_python.sync_playwright")
    size = {"width": width, "height": 800}
    page = new_page(served.url, viewport=size, color_scheme=scheme)
    found = {"first": serious(axe_core, page)}
    ask(page, expect)
    pane(page, 1).locator(".token").nth(2).hover()
    found["answered"] = serious(axe_core, page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pane(page, 1).get_by_role("button", name="Copy").click()
    found["copy"] = serious(axe_core, page)
    page.keyboard.press("Escape")
    pane(page, 1).get_by_role("button", name="Save").click()
    found["save"] = serious(axe_core, page)
    page.keyboard.press("Escape")
    if page.locator("#settings summary").is_visible():
        page.locator("#settings summary").click()
    page.get_by_label("Blind vote").check()
    ask(page, expect, "And the mill?")
    found["vote"] = serious(axe_core, page)
    assert not any(found.values()), found


def serious(axe_core, page):
    found = axe_core.Axe().run(page).response["violations"]
    return [
        (entry["id"], [node["target"] for node in entry["nodes"]])
        for entry in found
        if entry["impact"] in ("serious", "critical")
    ]


def test_the_page_is_walked_with_the_keyboard_alone(new_page, expect, served):
    page = new_page(served.url)
    expect(page.locator(".pane")).to_have_count(2)
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.id || document.activeElement.ariaLabel || ''")
        )
        if seen[-1] == "send":
            break
    wanted = ["export", "temperature", "blind", "Weight of knowledge", "Weight of base", "prompt"]
    places = [seen.index(name) for name in wanted]
    assert places == sorted(places)
    assert seen[-1] == "send"
    page.keyboard.press("Enter")
    expect(page.locator(".answer[data-state=done]")).to_have_count(2)
    expect(page.get_by_role("status").last).to_contain_text("lighthouse")
