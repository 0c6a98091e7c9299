"""Sphinx configuration of the book: the committed notebooks, the documentation and the API reference (`make book`).

No notebook is executed, and neither the build nor a finished page loads anything from a network. Figures and numbers
are the committed outputs; equations are rendered by a copy of MathJax beside the pages. The API reference is made from
the docstrings. The source folder is the repository; index.html leads to the first notebook.
"""

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

CHAPTERS = Path(__file__).parent.parent
LESSONS = sorted(f"chapters/{path.stem}" for path in CHAPTERS.glob("*.ipynb"))
DOCS = (
    "results parity your_images pretrained_weights tracking speed distributed adding_a_method teaching glossary".split()
)
REDIRECT = (
    '<!doctype html><meta charset="utf-8"><title>minissl</title><meta http-equiv="refresh" content="0; url={0}">'
    '<a href="{0}">minissl</a>\n'
)
WIDGET = "application/vnd.jupyter.widget-view+json"
STILL = "*This page has no widgets; open the notebook in JupyterLab to use them. A still image is beside this cell.*"

project = "minissl"
html_title = "minissl"
html_show_copyright = html_show_sphinx = html_use_index = False
language = "en"
root_doc = LESSONS[0]
include_patterns = ["chapters/*.ipynb", "chapters/solutions/*.ipynb", "docs/*.md", "docs/api/*.rst", "data/README.md"]
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.apidoc"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
apidoc_modules = [
    {
        "path": "../../minissl",
        "destination": "docs/api",
        "separate_modules": True,
        "module_first": True,
        "exclude_patterns": ["**/__main__.py"],
    }
]
autodoc_member_order = "bysource"
autodoc_default_options = {"ignore-module-all": True}  # a name is documented where it is defined
suppress_warnings = ["ref.python"]  # a bare name in a docstring, as `log`, may have several definitions
autodoc_typehints = "none"  # the docstrings give shapes and ranges
default_role = "code"
napoleon_use_ivar = True
mathjax_path = "mathjax/tex-chtml-full.js"

nb_execution_mode = "off"
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_favicon = "icon.svg"
html_show_search_summary = False  # browsers do not let a local file fetch the other pages
html_sourcelink_suffix = ""  # a page's source is downloaded as .ipynb
html_context = {"default_mode": "auto"}
html_theme_options = {
    "footer_content_items": [],
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "use_fullscreen_button": False,
}

if repository := os.environ.get("REPOSITORY"):  # make book REPOSITORY=https://github.com/... adds launch buttons
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
            "notebook_interface": "jupyterlab",
        },
    }


def prepare(app, name: str, source: list[str]) -> None:
    """Adapt a notebook while it is read.

    READMEs are linked as files, widgets are replaced by a sentence, and the first page lists all others.
    """
    if not name.startswith("chapters/"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = re.sub(r"\]\((?=[\w./]+\.md\))", "](path:", "".join(cell["source"]))
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                output["data"] = {"text/markdown": STILL}
    if name == root_doc:
        solutions = sorted(f"/chapters/solutions/{path.stem}" for path in CHAPTERS.glob("solutions/*.ipynb"))
        text = contents("Chapters", [f"/{lesson}" for lesson in LESSONS[1:]]) + contents("Solutions", solutions)
        text += contents(
            "Documentation", ["/docs/index", *(f"/docs/{page}" for page in DOCS), "/data/README", "/docs/api/modules"]
        )
        notebook["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": text})
    source[0] = json.dumps(notebook)


def contents(caption: str, names: list[str]) -> str:
    """Return one part of the table of contents."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", "", ""])


def finish(app, error: Exception | None) -> None:
    """Copy MathJax beside the pages, and write an index.html that leads to the first page."""
    if error is None:
        mathjax = Path(*find_spec("sphinx-mathjax-offline").submodule_search_locations) / "static" / "mathjax"
        beside = Path(app.outdir) / "_static" / "mathjax"
        shutil.copytree(mathjax / "output" / "chtml", beside / "output" / "chtml", dirs_exist_ok=True)
        shutil.copy(mathjax / "tex-chtml-full.js", beside)
        (Path(app.outdir) / "index.html").write_text(REDIRECT.format(f"{root_doc}.html"), encoding="utf-8")


def setup(app) -> None:
    """Register the two hooks with Sphinx."""
    app.connect("source-read", prepare)
    app.connect("build-finished", finish)
