"""The house keeps its rules: who imports whom, how long things are, and what never happens in a training step.

The rules are read from the syntax tree, and every rule is tried on a source that breaks it.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minissl"
FILES = sorted(PACKAGE.rglob("*.py"))
ANCESTORS = {"dino": set(), "dinov2": {"dino"}, "dinov3": {"dino", "dinov2"}}
FOR_METHODS = {"errors", "method", "teacher", "views", "vit", "convnet", "parallel"}
FORBIDDEN = {  # room: what it may not import
    "train": {"methods", "runs", "data", "evaluate", "visualize"},
    "record": {"methods", "runs", "train", "data", "evaluate", "visualize"},
    "evaluate": {"methods", "runs", "train", "data", "visualize"},
    "visualize": {"methods", "runs", "train", "data"},
    "data": {"methods", "runs", "train", "evaluate", "visualize", "vit", "method", "teacher", "views"},
    "vit": {"methods", "runs", "train", "teacher", "views", "data", "evaluate", "visualize"},
    "views": {"methods", "runs", "train", "teacher", "vit", "data", "evaluate", "visualize"},
    "pretrained": {"methods", "runs", "train"},
}
SYNCHRONISING = {"item", "cpu", "numpy", "tolist", "nonzero", "synchronize"}


def name_of(path: Path) -> str:
    """minissl/methods/dino.py -> methods.dino"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> set[str]:
    """The minissl modules a source imports, "methods.dino" for minissl.methods.dino; others as ":name"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = (PACKAGE.parent / Path(*node.module.split("."))).is_dir()
            found |= {f"{node.module}.{alias.name}" if inside else node.module for alias in node.names}
    return {name.removeprefix("minissl.") if name.startswith("minissl") else f":{name}" for name in found}


def broken_imports(module: str, source: str) -> list[str]:
    """The imports of a module that its room does not allow."""
    inside = {name for name in imports(source) if not name.startswith(":")}
    room, _, method = module.partition(".")
    bad = [name for name in inside if name.split(".")[0] in FORBIDDEN.get(room, ())]
    if room == "methods" and method:
        allowed = FOR_METHODS | {f"methods.{a}" for a in ANCESTORS.get(method, ())}
        bad += [name for name in inside if name not in allowed]
    return bad + [name for name in imports(source) if name.split(".")[0] in (":chapters", ":tests")]


def long_functions(source: str, most: int = 40) -> list[str]:
    """Functions of more than `most` lines, their docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            lines = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if doc else 0)
            found += [node.name] if lines > most else []
    return found


def side_effects(source: str) -> list[int]:
    """Lines at a module's top level that do something when it is imported."""
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    found = []
    for node in ast.parse(source).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        found += [] if text or main or isinstance(node, quiet) else [node.lineno]
    return found


def synchronising_calls(source: str) -> list[str]:
    """Calls that make a GPU wait, or move data back from it."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return [ast.unparse(call) for call in calls if call.func.attr in SYNCHRONISING]


def untrusted_loads(source: str) -> list[str]:
    """pickle, and torch.load without weights_only=True."""
    bad = [name for name in imports(source) if name.split(".")[0] in (":pickle", ":dill", ":joblib")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
            bad += [] if safe else [ast.unparse(node)]
    return bad


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_keeps_the_rules(path):
    source = path.read_text(encoding="utf-8")
    assert broken_imports(name_of(path), source) == []
    assert long_functions(source) == []
    assert side_effects(source) == []
    assert untrusted_loads(source) == []
    assert source.count("\n") <= (250 if "methods" in path.parts else 300)
    assert path.name not in ("utils.py", "helpers.py", "common.py")


STEP = [p for p in FILES if "methods" in p.parts or p.stem in ("vit", "teacher", "views")]


@pytest.mark.parametrize("path", STEP, ids=name_of)
def test_nothing_in_a_step_makes_a_gpu_wait(path):
    assert synchronising_calls(path.read_text(encoding="utf-8")) == []


def test_no_module_imports_itself_over_others():
    graph = {name_of(p): {i for i in imports(p.read_text(encoding="utf-8")) if not i.startswith(":")} for p in FILES}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name in done or name not in graph:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


def test_the_package_holds_python_only():
    assert {p.suffix for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == {".py"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods.dino", "from minissl.methods.simclr import nt_xent"),
        ("methods.dino", "from minissl.methods.dinov2 import koleo"),
        ("methods.dino", "from minissl.train import fit"),
        ("methods.dino", "from minissl import checkpoint"),
        ("train", "import minissl.methods.dino"),
        ("evaluate.classify", "from minissl.methods import dino"),
        ("visualize.pca", "from minissl.methods.dino import DINO"),
        ("data.scenes", "from minissl.vit import vit"),
        ("vit", "from tests.golden import wave"),
    ],
)
def test_a_broken_import_is_seen(module, source):
    assert broken_imports(module, source)


def test_an_allowed_import_is_not():
    assert broken_imports("methods.dinov2", "from minissl.methods.dino import DINO\nimport torch") == []
    assert broken_imports("methods.dino", "from minissl.views import multi_crop") == []


def test_other_broken_rules_are_seen():
    assert long_functions("def f():\n" + "    x = 1\n" * 41) == ["f"]
    assert long_functions("def f():\n    '''" + "\n" * 60 + "'''\n    return 1\n") == []
    assert side_effects("import os\nprint('hello')") == [2]
    assert side_effects("torch.manual_seed(0)") == [1]
    assert synchronising_calls("loss = terms['loss'].item()")
    assert untrusted_loads("torch.load(path)")
    assert untrusted_loads("torch.load(path, weights_only=False)")
    assert untrusted_loads("import pickle")
    assert untrusted_loads("torch.load(path, weights_only=True)") == []
