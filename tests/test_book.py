"""The pages that `make book` makes of the notebooks: all are there, whole, and ask nobody for anything.

How they look and behave in a browser is tested in `test_browser`.
"""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "chapters"
NOTEBOOKS = sorted([*CHAPTERS.glob("*.ipynb"), *CHAPTERS.glob("solutions/*.ipynb")])
PICTURE = "image/png"
WIDGET = "application/vnd.jupyter.widget-view+json"


def name_of(path):
    """chapters/solutions/2_clip.ipynb -> solutions/2_clip"""
    return path.relative_to(CHAPTERS).with_suffix("").as_posix()


def make_book(folder):
    """Run `make book` with this Python; a warning is an error."""
    words = [f"PYTHON={sys.executable}", "READY=", f"BOOK={folder}", "OPTIONS=-W --keep-going"]
    made = subprocess.run(["make", "book", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    pytest.importorskip("myst_nb", reason="the packages of `book` are missing: python -m pip install -e .[book]")
    return make_book(tmp_path_factory.mktemp("site") / "book")


def tight(text):
    return "".join(text.split())


class Page(HTMLParser):
    """What a page is made of: its text without spaces, its pictures' texts, every address it would load by itself."""

    def __init__(self, path):
        super().__init__()
        self.alts, self.loads, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_data(self, text):
        self.text += tight(text)

    def handle_starttag(self, tag, attributes):
        words = dict(attributes)
        if tag == "img":
            self.alts.append(words.get("alt"))
        loaded = tag != "link" or words.get("rel") in ("stylesheet", "icon", "preload")
        self.loads += [words[key] for key in ("src", "href") if key in words and tag != "a" and loaded]


def cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def outputs(path, kind):
    """The outputs of a notebook that have a kind of data, each with its cell's metadata."""
    return [(c["metadata"], o) for c in cells(path) for o in c["outputs"] if kind in o.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_page_has_all_that_its_notebook_shows(book, path):
    page = Page(book / f"{name_of(path)}.html")
    assert len(page.alts) == len(outputs(path, PICTURE))
    assert page.text.count(tight("On this page nothing moves")) == len(outputs(path, WIDGET))
    assert "Box(children" not in page.text
    printed = [
        output["text"] for cell in cells(path) for output in cell["outputs"] if output["output_type"] == "stream"
    ]
    assert printed
    for text in printed:
        assert tight("".join(text)) in page.text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_what_a_picture_shows_is_said(book, path):
    said = [metadata.get("mystnb", {}).get("image", {}).get("alt") for metadata, _ in outputs(path, PICTURE)]
    assert Page(book / f"{name_of(path)}.html").alts == said


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_page_gives_its_notebook(book, path):
    folder = "../" if "/" in name_of(path) else ""
    assert f'href="{folder}_sources/{name_of(path)}.ipynb"' in (book / f"{name_of(path)}.html").read_text()
    assert (book / "_sources" / f"{name_of(path)}.ipynb").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(book):
    pages = [*book.glob("*.html"), *book.glob("solutions/*.html")]
    assert len(pages) == len(NOTEBOOKS) + 2  # the first page again, and the search
    for path in pages:
        for address in Page(path).loads:
            assert "//" not in address, (path.name, address)
            file = path.parent / address.split("?")[0].split("#")[0]
            assert file.exists(), (path.name, address)


@pytest.mark.slow
def test_the_map_is_the_first_page_and_leads_to_all_others(book):
    first = (book / "index.html").read_text(encoding="utf-8")
    assert first == (book / "0_map.html").read_text(encoding="utf-8")
    chapters, solutions = first.split(">Chapters<")[1].split(">Solutions<")
    for path in NOTEBOOKS[1:]:
        assert f'href="{name_of(path)}.html"' in (solutions if path.parent != CHAPTERS else chapters), path


# The cell that every lesson begins with: nothing here, the whole course on Colab. The README says what REPOSITORY is.
LESSONS = [path for path in NOTEBOOKS if path.parent == CHAPTERS]


def first_cell(path):
    return "".join(cells(path)[0]["source"])


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty folder to run the cell in, and the list of the commands it gives; a clone makes folders."""
    given = []

    def run(command, **_):
        given.append(command)
        (tmp_path / "course" / "chapters").mkdir(parents=True)
        (tmp_path / "course" / "minissl").mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", ["python"])
    monkeypatch.chdir(tmp_path)
    return given


def test_all_lessons_begin_with_the_same_cell_that_is_no_part_of_their_page():
    assert {first_cell(path) for path in LESSONS} == {first_cell(LESSONS[0])}
    for path in LESSONS:
        assert "remove-cell" in cells(path)[0]["metadata"].get("tags", []), path.name
        assert cells(path)[0]["outputs"] == []


def test_the_first_cell_does_nothing_here(elsewhere, tmp_path):
    exec(first_cell(LESSONS[0]), {})
    assert (elsewhere, sys.path, Path.cwd()) == ([], ["python"], tmp_path)


def test_the_first_cell_fetches_the_course_once_on_colab(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    for folder in (tmp_path, tmp_path / "course" / "chapters", tmp_path):  # at first, run again, after a restart
        monkeypatch.chdir(folder)
        exec(first_cell(LESSONS[0]), {})
        assert Path.cwd() == tmp_path / "course" / "chapters"
        assert sys.path[0] == str(tmp_path / "course")
    assert len(elsewhere) == 1
    assert re.fullmatch(r"git clone --depth 1 \S+ course && pip install --quiet -e course", elsewhere[0])
