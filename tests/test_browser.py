"""In a browser, a slider in JupyterLab changes its image."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser import open_chromium

pytestmark = pytest.mark.slow
CHAPTERS = Path(__file__).parent.parent / "chapters"
LESSON = "3_3_dino"  # its first widget is quick
READY = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
IMAGE_BYTES = """() => fetch(document.querySelector("img.widget-image").src).then(r => r.arrayBuffer())
    .then(bytes => [...new Uint8Array(bytes)])"""


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


def test_a_slider_changes_its_image(tmp_path):
    (tmp_path / f"{LESSON}.ipynb").write_text(first_widget(CHAPTERS / f"{LESSON}.ipynb"), encoding="utf-8")
    with open_chromium() as chromium, jupyterlab(tmp_path) as address:
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
