"""Every path, command, option and name in README, data/README, notes and notebooks exists."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minissl.cli import COMMANDS, train_parser, with_underscores
from minissl.methods import list_methods

ROOT = Path(__file__).parent.parent
MADE = {"runs", ".venv", "build", "wheels", "start.py", "START.md"}  # created by commands
CHAPTERS = ROOT / "chapters"
PROSE = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted(CHAPTERS.rglob("*.ipynb"))]
PROSE += sorted((CHAPTERS / "notes").glob("*.md"))


def prose(path):
    """The text of a Markdown file, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def words_in_code(path):
    """The inline code and the lines of code blocks."""
    text = prose(path)
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), "\n".join(blocks)


by_file = pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))


@by_file
def test_paths_exist(path):
    inline, _ = words_in_code(path)
    links = re.findall(r"\]\(([^)#]+)\)", prose(path))
    paths = [w for w in inline if re.fullmatch(r"[\w.-]+/[\w./-]+|[\w-]+\.(md|py|toml|yml)", w)] + links
    for name in paths:
        if name.startswith("http") or name.split("/")[0] in MADE:
            continue
        places = (ROOT / name, path.parent / name, ROOT / "minissl" / name)
        assert any(place.exists() for place in places) or any((ROOT / "minissl").rglob(name)), name


@by_file
def test_names_exist(path):
    inline, _ = words_in_code(path)
    for name in (w for w in inline if re.fullmatch(r"minissl(\.\w+)+", w)):
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name


@by_file
def test_commands_exist(path):
    inline, blocks = words_in_code(path)
    text = "\n".join([*inline, blocks])
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z0-9-]+)", text):
        assert target in targets, target
    for line in re.findall(r"(?:^|python -m )minissl (.*)", text, re.MULTILINE):
        command, *rest = shlex.split(line.split("#")[0])
        if command == "train" and rest and rest[0] in list_methods() and "--help" not in rest:
            train_parser(rest[0], "cpu").parse_args([with_underscores(word) for word in rest[1:]])
        assert command in COMMANDS or command.startswith("-"), line


def test_make_alone_lists_its_targets():
    out = subprocess.run(
        ["make", f"SYSTEM_PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for target in ("setup", "chapter3", "lab", "test", "test-fast", "check"):
        assert re.search(rf"make {target} +\w", out.stdout), target


def test_no_path_of_one_machine_is_named():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if Path(name).suffix in (".py", ".md", ".toml", ".yml", ".ipynb") or name in ("Makefile", ".ci/run"):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert "/" + "work/" not in text, name
            assert "../" + "shared" not in text, name
