"""A real browser, with the network cut off, and processes that need not import everything anew."""

import shutil
from multiprocessing import get_context

import pytest

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if _BROWSER is None:
        pytest.skip("there is no Chromium or Chrome on the path")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=_BROWSER, args=arguments, timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def open_file(browser):
    """Opens files as pages; at the end nothing may have been asked of the network or complained of."""
    asked, complaints, contexts, opened = [], [], [], set()

    def open_file(path, width=1400, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        opened.add(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith("data:")} == opened
    assert complaints == []


@pytest.fixture(scope="session")
def start():
    """Starts processes, forked from one that has imported already what takes each ten seconds."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["anomalib.cli.cli", "anomalib_ot.comparison", "anomalib_ot.models"])

    def start(target, *arguments):
        """The first argument of each process is its number."""
        processes = [context.Process(target=target, args=(number, *each)) for number, each in enumerate(arguments)]
        for process in processes:
            process.start()
        return processes

    return start
