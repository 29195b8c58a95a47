"""A Chromium of the system for the playground's page, and what it looks at."""

import os
import shutil

import pytest
from processes import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


# Of a module: while it runs, Playwright's event loop is this thread's, and nobody else's can be.
@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'"
    )
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH: the playground's page is not looked at")
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as which containers run.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium):
    """Open a page in a profile of its own; nothing may go wrong in it unseen."""
    contexts, faults = [], []

    def open_page(url="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        if url:
            page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def expect():
    """Playwright's, with patience for a machine that has much else to do."""
    found = pytest.importorskip("playwright.sync_api").expect
    found.set_options(timeout=20_000)
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that no test ends."""
    server = Served(tmp_path_factory.mktemp("served"))
    server.start()
    yield server
    server.kill()
