"""In a browser: the book's pages render on a desktop and on a phone, and a slider in JupyterLab changes its image.

Chromium opens the pages as local files, where no page can load anything from a server.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.test_book import CHAPTERS, NOTEBOOKS, ROOT, make_book, name_of

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: python -m pip install -e .[browser]")
pytest.importorskip("myst_nb", reason="the packages of `book` are missing: python -m pip install -e .[book]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make browser` installs it"),
]
DOCS = sorted(ROOT.glob("docs/*.md"))
LESSON = "3_3_dino"  # its first widget is quick
BROKEN = """() => [
    ...[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => `image not loaded: ${i.src}`),
    ...[...document.images].filter(i => !/\\w \\w/.test(i.alt)).map(i => `image without alt text: ${i.src}`),
    ...[...document.querySelectorAll("span.math, div.math")].filter(m => !m.querySelector("mjx-container"))
        .map(m => `equation not rendered: ${m.textContent}`),
    ...[...document.querySelectorAll("mjx-merror")].map(m => `equation with an error: ${m.textContent}`),
    ...(document.documentElement.scrollWidth > innerWidth ? ["wider than the window"] : []),
]"""
READY = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
IMAGE_BYTES = """() => fetch(document.querySelector("img.widget-image").src).then(r => r.arrayBuffer())
    .then(bytes => [...new Uint8Array(bytes)])"""


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return make_book(tmp_path_factory.mktemp("site") / "book")


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM)
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


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_pages_render(book, chromium, width):
    errors_by_page = {}
    with window(chromium, width) as (page, errors):
        page.goto((book / "index.html").as_uri())
        page.wait_for_url("**/chapters/0_map.html")  # index.html leads to the first notebook
        for name in ["search", *map(name_of, NOTEBOOKS), *map(name_of, DOCS)]:
            page.goto((book / f"{name}.html").as_uri())
            page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")  # wait for it
            errors_by_page[name] = [*errors, *page.evaluate(BROKEN)]
            errors.clear()
    assert {name: found for name, found in errors_by_page.items() if found} == {}


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_search_finds_a_page(book, chromium, width):
    with window(chromium, width) as (page, errors):
        page.goto((book / "chapters/2_clip.html").as_uri())
        page.locator("button[aria-label=Search]:visible").click()
        page.keyboard.type("Sinkhorn")
        page.keyboard.press("Enter")
        page.locator("#search-results a", has_text="3.4 DINOv2").first.click()
        page.wait_for_url("**/chapters/3_4_dinov2.html*")
        assert errors == []


@contextmanager
def jupyterlab(folder):
    """Start a JupyterLab without the user's settings; yield its address with the token."""
    folders = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--ServerApp.port=0", "--no-browser", "--allow-root", "--IdentityProvider.token=course"]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder, env=os.environ | folders, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            state = "".join(path.read_text() for path in (folder / "RUNTIME").glob("jpserver-*.json"))
            if state.endswith("}"):
                break
            time.sleep(0.1)
        yield f"{json.loads(state)['url']}lab/tree/{LESSON}.ipynb?token=course"
    finally:
        server.terminate()  # it stops its kernels first
        server.wait(30)


def first_widget(path):
    """Return a notebook up to its first widget, without outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    end = next(i for i, cell in enumerate(notebook["cells"]) if "interactive_figure(" in "".join(cell["source"]))
    notebook["cells"] = notebook["cells"][: end + 1]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(notebook)


def test_a_slider_changes_its_image(tmp_path, chromium):
    (tmp_path / f"{LESSON}.ipynb").write_text(first_widget(CHAPTERS / f"{LESSON}.ipynb"), encoding="utf-8")
    with jupyterlab(tmp_path) as address:
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        page.goto(address)
        page.locator(".jp-Notebook .jp-CodeCell").first.click()
        page.locator(READY).first.wait_for()  # cells run before the kernel is ready are dropped silently
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator("img.widget-image").wait_for()
        before = page.evaluate(IMAGE_BYTES)
        page.locator(".noUi-handle").first.press("ArrowLeft")
        deadline = time.monotonic() + 60
        while (after := page.evaluate(IMAGE_BYTES)) == before and time.monotonic() < deadline:
            page.wait_for_timeout(100)
        assert bytes(before)[:4] == bytes(after)[:4] == b"\x89PNG"
        assert before != after
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        page.close()
