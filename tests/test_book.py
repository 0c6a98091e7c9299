"""The book: every page has the outputs of its notebook and loads nothing from a network.

In Chromium, the pages are local files, from which no page can load anything from a server.
"""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import open_chromium, window

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "chapters"
NOTEBOOKS = sorted([*CHAPTERS.glob("*.ipynb"), *CHAPTERS.glob("solutions/*.ipynb")])
LESSONS = [path for path in NOTEBOOKS if path.parent == CHAPTERS]
IMAGE = "image/png"
WIDGET = "application/vnd.jupyter.widget-view+json"
BROKEN = """() => [
    ...[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => `image not loaded: ${i.src}`),
    ...[...document.images].filter(i => !/\\w \\w/.test(i.alt)).map(i => `image without alt text: ${i.src}`),
    ...[...document.querySelectorAll("span.math, div.math")].filter(m => !m.querySelector("mjx-container"))
        .map(m => `equation not rendered: ${m.textContent}`),
    ...[...document.querySelectorAll("mjx-merror")].map(m => `equation with an error: ${m.textContent}`),
    ...(document.documentElement.scrollWidth > innerWidth ? ["wider than the window"] : []),
]"""


def name_of(path):
    """chapters/solutions/2_clip.ipynb -> chapters/solutions/2_clip, its page without .html"""
    return path.relative_to(ROOT).with_suffix("").as_posix()


def make_book(folder):
    """Run `make book` with this Python; a warning is an error."""
    arguments = [f"PYTHON={sys.executable}", "READY=", f"BOOK={folder}", "OPTIONS=-W --keep-going"]
    process = subprocess.run(["make", "book", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    pytest.importorskip("myst_nb", reason="the packages of `book` are missing: python -m pip install -e .[book]")
    return make_book(tmp_path_factory.mktemp("site") / "book")


def without_spaces(text):
    return "".join(text.split())


class Page(HTMLParser):
    """Parse a page: its text without spaces, the texts of its images, and every address that it loads by itself."""

    def __init__(self, path):
        super().__init__()
        self.alts, self.loads, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_data(self, text):
        self.text += without_spaces(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.alts.append(values.get("alt"))
        loaded = tag != "link" or values.get("rel") in ("stylesheet", "icon", "preload")
        self.loads += [values[key] for key in ("src", "href") if key in values and tag != "a" and loaded]


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def cells_with_output(path, mime_type):
    """Return the metadata of the cell of each output of a type, in order."""
    return [c["metadata"] for c in code_cells(path) for o in c["outputs"] if mime_type in o.get("data", {})]


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)


@pytest.mark.slow
@every_notebook
def test_a_page_has_every_output_of_its_notebook(book, path):
    page = Page(book / f"{name_of(path)}.html")
    assert len(page.alts) == len(cells_with_output(path, IMAGE))
    assert page.text.count("Thispagehasnowidgets") == len(cells_with_output(path, WIDGET))
    assert "Box(children" not in page.text
    printed = [o["text"] for cell in code_cells(path) for o in cell["outputs"] if o["output_type"] == "stream"]
    assert printed
    for text in printed:
        assert without_spaces("".join(text)) in page.text


@pytest.mark.slow
@every_notebook
def test_every_image_of_a_page_has_its_alternative_text(book, path):
    alts = [cell["mystnb"]["image"]["alt"] for cell in cells_with_output(path, IMAGE)]
    assert Page(book / f"{name_of(path)}.html").alts == alts


@pytest.mark.slow
@every_notebook
def test_a_page_offers_its_notebook_for_download(book, path):
    up = "../" * name_of(path).count("/")
    assert f'href="{up}_sources/{name_of(path)}.ipynb"' in (book / f"{name_of(path)}.html").read_text()
    assert (book / "_sources" / f"{name_of(path)}.ipynb").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_pages_load_local_files_only(book):
    pages = [path for path in book.rglob("*.html") if "_static" not in path.parts]
    assert len(pages) > len(NOTEBOOKS)
    for path in pages:
        for address in Page(path).loads:
            assert "//" not in address, (path.name, address)
            file = path.parent / address.split("?")[0].split("#")[0]
            assert file.exists(), (path.name, address)


@pytest.mark.slow
def test_index_leads_to_the_map_which_links_to_all_notebooks(book):
    assert 'url=chapters/0_map.html"' in (book / "index.html").read_text(encoding="utf-8")
    page = (book / "chapters/0_map.html").read_text(encoding="utf-8")
    for path in NOTEBOOKS[1:]:
        assert f'href="{path.relative_to(CHAPTERS).with_suffix("").as_posix()}.html"' in page, path


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_pages_render(book, chromium, width):
    errors_by_page = {}
    with window(chromium, width) as (page, errors):
        page.goto((book / "index.html").as_uri())
        page.wait_for_url("**/chapters/0_map.html")  # index.html leads to the first notebook
        for name in ["search", *map(name_of, NOTEBOOKS), *map(name_of, sorted(ROOT.glob("docs/*.md")))]:
            page.goto((book / f"{name}.html").as_uri())
            page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")  # wait for it
            errors_by_page[name] = [*errors, *page.evaluate(BROKEN)]
            errors.clear()
    assert {name: found for name, found in errors_by_page.items() if found} == {}


@pytest.mark.slow
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


# The first cell of every lesson: it clones the course on Colab and does nothing elsewhere.


def first_cell(path):
    return "".join(code_cells(path)[0]["source"])


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Run in an empty folder; return the list of shell commands, of which a clone only makes folders."""
    given = []

    def run(command, **_):
        given.append(command)
        (tmp_path / "course" / "chapters").mkdir(parents=True)
        (tmp_path / "course" / "minissl").mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", ["python"])
    monkeypatch.chdir(tmp_path)
    return given


def test_all_lessons_begin_with_the_same_hidden_cell():
    assert {first_cell(path) for path in LESSONS} == {first_cell(LESSONS[0])}
    for path in LESSONS:
        assert "remove-cell" in code_cells(path)[0]["metadata"].get("tags", []), path.name
        assert code_cells(path)[0]["outputs"] == []


def test_the_first_cell_does_nothing_outside_colab(commands, tmp_path):
    exec(first_cell(LESSONS[0]), {})
    assert (commands, sys.path, Path.cwd()) == ([], ["python"], tmp_path)


def test_the_first_cell_clones_the_course_once_on_colab(commands, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    for folder in (tmp_path, tmp_path / "course" / "chapters", tmp_path):  # first run, second run, after a restart
        monkeypatch.chdir(folder)
        exec(first_cell(LESSONS[0]), {})
        assert Path.cwd() == tmp_path / "course" / "chapters"
        assert sys.path[0] == str(tmp_path / "course")
    assert len(commands) == 1
    assert re.fullmatch(r"git clone --depth 1 \S+ course && pip install --quiet -e course", commands[0])
