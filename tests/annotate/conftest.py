"""Headless Chromium for the annotation pages."""

import shutil

import pytest
from acts import SAMPLE

from lib import annotate
from lib.papers.fine_grained import schema as qa

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]


@pytest.fixture
def records():
    return qa.load_feedback(SAMPLE)


@pytest.fixture(scope="session")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt install chromium)")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """open_page(items, kind, **context options) -> a page from a file, watched for errors and requests.

    `beside=page` opens a second tab of that page's browser; every other call is a machine of its own.
    """
    contexts = []

    def open_it(items, kind="spans", beside=None, guidelines=None, **options):
        path = annotate.write(items, tmp_path / f"{kind}.html", kind, guidelines=guidelines)
        if beside is None:
            contexts.append(chromium.new_context(accept_downloads=True, **options))
        page = (contexts[-1] if beside is None else beside.context).new_page()
        page.set_default_timeout(30_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda r: page.faults.append(r.url) if "http" in r.url[:5] else None)
        page.on("dialog", lambda dialog: page.faults.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        assert not [fault for page in context.pages for fault in page.faults]
        context.close()
