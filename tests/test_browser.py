"""In a browser: the pages of the book are whole at a desk and on a phone, and in JupyterLab a slider moves a picture.

Chromium opens the pages as files, as someone does who unpacked them: there no page may ask a server for anything.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.test_book import CHAPTERS, NOTEBOOKS, make_book, name_of

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: python -m pip install -e .[browser]")
pytest.importorskip("myst_nb", reason="the packages of `book` are missing: python -m pip install -e .[book]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make browser` installs it"),
]
LESSON = "3_3_dino"  # its first widget needs a second
BROKEN = """() => [
    ...[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => `not shown: ${i.src}`),
    ...[...document.images].filter(i => !/\\w \\w/.test(i.alt)).map(i => `no words for it: ${i.src}`),
    ...[...document.querySelectorAll("span.math, div.math")].filter(m => !m.querySelector("mjx-container"))
        .map(m => `no equation: ${m.textContent}`),
    ...[...document.querySelectorAll("mjx-merror")].map(m => `a wrong equation: ${m.textContent}`),
    ...(document.documentElement.scrollWidth > innerWidth ? ["wider than the window"] : []),
]"""
READY = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
PICTURE = """() => fetch(document.querySelector("img.widget-image").src).then(r => r.arrayBuffer())
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
    """A window, and the list of what goes wrong in it: errors, and what is loaded but no file of ours."""
    page, wrong = chromium.new_page(viewport={"width": width, "height": height}), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    left = "net::ERR_ABORTED"  # an icon still on its way when the next page is opened
    page.on("requestfailed", lambda r: None if r.failure == left else wrong.append(f"{r.failure}: {r.url}"))
    ours = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(ours) else wrong.append(f"from elsewhere: {r.url}"))
    yield page, wrong
    page.close()


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_pages_are_whole(book, chromium, width):
    found = {}
    with window(chromium, width) as (page, wrong):
        for name in ["index", "search", *map(name_of, NOTEBOOKS)]:
            page.goto((book / f"{name}.html").as_uri())
            page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")  # it is waited for
            found[name] = [*wrong, *page.evaluate(BROKEN)]
            wrong.clear()
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_a_word_is_found(book, chromium, width):
    with window(chromium, width) as (page, wrong):
        page.goto((book / "2_clip.html").as_uri())
        page.locator("button[aria-label=Search]:visible").click()
        page.keyboard.type("Sinkhorn")
        page.keyboard.press("Enter")
        page.locator("#search-results a", has_text="DINOv2").click()
        page.wait_for_url("**/3_4_dinov2.html*")
        assert wrong == []


@contextmanager
def jupyterlab(folder):
    """A JupyterLab of its own, with nobody's settings; its address, with the token."""
    places = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    words = ["--ServerApp.port=0", "--no-browser", "--allow-root", "--IdentityProvider.token=course"]
    words += [f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words],
            cwd=folder, env=os.environ | places, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            said = "".join(path.read_text() for path in (folder / "RUNTIME").glob("jpserver-*.json"))
            if said.endswith("}"):
                break
            time.sleep(0.1)
        yield f"{json.loads(said)['url']}lab/tree/{LESSON}.ipynb?token=course"
    finally:
        server.terminate()  # it ends its kernels first
        server.wait(30)


def beginning(path):
    """A notebook up to its first widget, without outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    end = next(i for i, cell in enumerate(notebook["cells"]) if "figure_for(" in "".join(cell["source"]))
    notebook["cells"] = notebook["cells"][: end + 1]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(notebook)


def test_a_slider_moves_a_picture(tmp_path, chromium):
    (tmp_path / f"{LESSON}.ipynb").write_text(beginning(CHAPTERS / f"{LESSON}.ipynb"), encoding="utf-8")
    with jupyterlab(tmp_path) as address:
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        page.goto(address)
        page.locator(".jp-Notebook .jp-CodeCell").first.click()
        page.locator(READY).first.wait_for()  # cells that are run before the kernel is there are dropped without a word
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator("img.widget-image").wait_for()
        before = page.evaluate(PICTURE)
        page.locator(".noUi-handle").first.press("ArrowLeft")
        late = time.monotonic() + 60
        while (after := page.evaluate(PICTURE)) == before and time.monotonic() < late:
            page.wait_for_timeout(100)
        assert bytes(before)[:4] == bytes(after)[:4] == b"\x89PNG"
        assert before != after
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        page.close()
