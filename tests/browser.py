"""Chromium for tests: a browser without a network, which reports its errors."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def open_chromium():
    """Open a browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e .[browser]")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: `make browser` installs it")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def window(chromium, width, height=900):
    """Open a window; yield it and the list of its errors, among them requests for anything but a local file."""
    page, errors = chromium.new_page(viewport={"width": width, "height": height}), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    aborted = "net::ERR_ABORTED"  # an icon still on its way when the next page is opened
    page.on("requestfailed", lambda r: None if r.failure == aborted else errors.append(f"{r.failure}: {r.url}"))
    local = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(local) else errors.append(f"not local: {r.url}"))
    yield page, errors
    page.close()
