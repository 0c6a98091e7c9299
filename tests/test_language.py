"""The glossary holds: words of tests/banned_words.txt do not come back in prose, docstrings, comments and strings."""

import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULES = [line.split("\t") for line in (ROOT / "tests/banned_words.txt").read_text(encoding="utf-8").splitlines()
         if line and not line.startswith("#")]  # fmt: skip
BANNED = re.compile("|".join(rf"\b(?:{rule})\b" for rule, _ in RULES), re.IGNORECASE)
ALLOWED = {  # file: words that it may use, because they are names of others or what is tested
    "README.md": {"pictures"},  # the folder data/pictures
    "docs/results.md": {"pictures"},
    "chapters/book/conf.py": {"pictures"},
    "chapters/kit.py": {"pictures"},
    "data/README.md": {"pictures"},
    "docs/teaching.md": {"pictures"},
    "minissl/data/synthetic/captions.py": {"picture"},  # a caption of Scenes, which stay byte for byte
    "minissl/evaluation/zero_shot.py": {"picture"},  # CLIP's prompt "a picture of a {}"
    "tests/test_openai_clip.py": {"picture"},
    "tests/test_tokenizer.py": {"picture"},
    "tests/test_prose.py": {"pictures"},
}
IGNORED = ("tests/banned_words.txt", "tests/test_language.py")


def words_of_python(source: str) -> str:
    """Strings and comments of a source, and its names with underscores as spaces."""
    parts = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type].startswith(("NAME", "STRING", "COMMENT", "FSTRING")):
            parts.append(token.string.replace("_", " "))
    return "\n".join(parts)


def words_of_notebook(text: str) -> str:
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def banned_words(path: Path) -> list[str]:
    """Banned words in a file, in order."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    text = words_of_python(text) if path.suffix == ".py" else text
    text = words_of_notebook(text) if path.suffix == ".ipynb" else text
    text = re.sub(r"https?://\S+", "", text)
    return [m[0].lower() for m in BANNED.finditer(text) if m[0].lower() not in ALLOWED.get(name, ())]


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kinds = (".py", ".md", ".yml", ".toml", ".cff")
    return [ROOT / n for n in listed if (n.endswith(kinds) or n == "Makefile") and n not in IGNORED]


def test_banned_words_do_not_come_back():
    found = {path.relative_to(ROOT).as_posix(): banned_words(path) for path in files() if path.exists()}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "sentence", ["Find the partner.", "The colour of the centre", "pictures of cats", "From nothing"]
)
def test_a_banned_word_is_found(sentence):
    assert BANNED.search(sentence)


@pytest.mark.parametrize("sentence", ["Find the positive.", "center and color", "estranged"])
def test_other_words_are_not(sentence):
    assert not BANNED.search(sentence)


def test_names_and_strings_of_code_are_read():
    assert "partner" in words_of_python("x = 1  # a partner")
    assert "grey" in words_of_python("def grey_share(): ...")
    assert "colour" in words_of_python("x = 'colour'")


if __name__ == "__main__":  # python -m tests.test_language: counts by file
    counts = {path.relative_to(ROOT).as_posix(): len(banned_words(path)) for path in files()}
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        if count:
            print(f"{count:5} {name}", file=sys.stdout)
