"""The house keeps its rules: who imports whom, how long things are, and what never happens in a training step.

The rules are read from the syntax tree. Each is a pure function of a source, and each is tried on a source that breaks
it: a rule that never bites proves nothing.
"""

import ast
from pathlib import Path

import pytest

from minissl.method import available, find

PACKAGE = Path(__file__).parent.parent / "minissl"
FILES = sorted(PACKAGE.rglob("*.py"))

ANCESTORS = {
    "dino": set(),
    "dinov2": {"dino"},
    "dinov3": {"dino", "dinov2"},
    "dinotxt": {"clip"},
}  # no sibling
FOR_METHODS = {"errors", "method", "teacher", "augment", "views", "transformer", "patches", "vit", "convnet", "text"}
FOR_METHODS |= {"balance", "color", "heads", "masking", "parallel"}
LOOPS = {"methods", "runs", "scores", "reports", "footage", "doctor", "lab", "train", "order", "record", "__main__"}
LOOPS |= {"survey", "advise", "album", "markup", "page"}
MODELS = {
    "encoders",
    "transformer",
    "patches",
    "vit",
    "convnet",
    "text",
    "method",
    "teacher",
    "augment",
    "views",
    "pretrained",
}
FORBIDDEN = {  # room: the rooms it may not import
    "train": LOOPS - {"record", "order"} | {"data", "evaluate", "visualize", "encoders", "vit", "convnet", "text"},
    "order": LOOPS | {"data", "evaluate", "visualize", "encoders", "vit", "convnet", "text"},
    "record": LOOPS | {"data", "evaluate", "visualize"},
    "doctor": LOOPS - {"train"} | MODELS | {"data", "evaluate", "visualize"},
    "evaluate": LOOPS | {"data", "visualize", "encoders", "vit", "convnet", "text"},
    "visualize": LOOPS | {"data", "encoders", "vit", "convnet", "text"},
    "data": LOOPS | MODELS | {"evaluate", "visualize"},
    "vit": LOOPS | {"teacher", "augment", "views", "data", "evaluate", "visualize"},
    "transformer": LOOPS | MODELS | {"data", "evaluate", "visualize"},
    "text": LOOPS | MODELS - {"transformer"} | {"data", "evaluate", "visualize"},
    "augment": LOOPS | MODELS | {"data", "evaluate", "visualize"},
    "views": LOOPS | MODELS - {"augment"} | {"data", "evaluate", "visualize"},
    "teacher": LOOPS | {"augment", "views", "data", "evaluate", "visualize"},
    "balance": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "optim"},
    "patches": LOOPS | MODELS | {"data", "evaluate", "visualize"},
    "heads": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "optim", "parallel", "balance"},
    "positions": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "optim", "parallel", "balance"},
    "masking": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "optim", "balance"},
    "color": LOOPS | MODELS | {"data", "evaluate", "visualize", "optim", "parallel"},
    "optim": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "parallel"},
    "parallel": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "optim"},
    "distribute": LOOPS | MODELS | {"data", "evaluate", "visualize", "color", "optim"},
    "pretrained": LOOPS,
    "official": LOOPS | {"encoders", "pretrained", "views", "teacher", "data", "evaluate", "visualize"},
    "official_clip": LOOPS | {"encoders", "pretrained", "views", "teacher", "data", "evaluate", "visualize"},
    "formats": LOOPS | {"encoders", "pretrained", "augment", "views", "teacher", "data", "evaluate", "visualize"},
    "film": LOOPS | MODELS - {"method"} | {"data", "visualize"},
    "survey": LOOPS - {"train"} | MODELS | {"evaluate", "visualize"},
    "advise": LOOPS - {"train", "survey"} | MODELS - {"method"} | {"data", "evaluate", "visualize"},
    "album": LOOPS - {"survey", "runs", "reports", "record", "doctor"}
    | MODELS - {"pretrained", "views"}
    | {"visualize"},
    "markup": LOOPS | MODELS | {"evaluate", "visualize"},
    "page": LOOPS - {"survey", "advise", "album", "markup"} | MODELS,
}
IGNORANT = {
    "train",
    "order",
    "distribute",
    "record",
    "doctor",
    "evaluate",
    "visualize",
    "checkpoint",
    "film",
    "machine",
    "data",
    "survey",
    "album",
    "markup",
    "page",
}  # rooms that know no method
SYNCHRONISING = {"item", "cpu", "numpy", "tolist", "nonzero", "synchronize"}
METHODS = {name: find(name).__name__ for name in available()}


def name_of(path: Path) -> str:
    """minissl/methods/dino.py -> methods.dino"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {f"minissl.{name_of(path)}" for path in FILES}


def imports(source: str) -> set[str]:
    """The modules a source imports, anywhere in it; a relative import keeps its dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES) | ({module} if names - MODULES else set())
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def ours(source: str) -> set[str]:
    """The imports from minissl, without its name: methods.dino."""
    return {name.removeprefix("minissl.") for name in imports(source) if name.split(".")[0] == "minissl"}


def broken_imports(module: str, source: str) -> list[str]:
    """The imports of a module that its room does not allow."""
    room, _, method = module.partition(".")
    bad = {name for name in imports(source) if name.split(".")[0] in ("chapters", "tests", "")}
    bad |= {name for name in ours(source) if name.split(".")[0] in FORBIDDEN.get(room, ())}
    if room == "methods" and method:
        allowed = FOR_METHODS | {f"methods.{name}" for name in ANCESTORS.get(method, ())}
        bad |= ours(source) - allowed
    return sorted(bad | (ours(source) & {"minissl"}))  # `import minissl` hides who is imported


def named_methods(source: str) -> list[str]:
    """Names of methods, or of their classes, in the code of a source; what docstrings and comments say is free."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and has_docstring(node)}
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
    return [t for t in texts if t in METHODS] + [name for name in names if name in METHODS.values()]


def has_docstring(node: ast.AST) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path of imports that comes back to where it began, or nothing."""
    done = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (search(other, [*path, name]) for other in graph.get(name, ()))), [])
        done.add(name)
        return found

    return next(filter(None, (search(name, []) for name in graph)), [])


def long_functions(source: str, most: int = 40) -> list[str]:
    """Functions of more than `most` lines, signature included, docstring not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring(node) else 0
            found += [node.name] if node.end_lineno - node.lineno + 1 - doc > most else []
    return found


def side_effects(source: str) -> list[int]:
    """Lines at a module's top level that do something when it is imported."""
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    found = []
    for node in ast.parse(source).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        found += [] if text or main or isinstance(node, quiet) else [node.lineno]
    return found


def synchronising_calls(source: str) -> list[str]:
    """Calls that make a GPU wait, or move data back from it."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    waits = [call for call in calls if call.func.attr in SYNCHRONISING]
    moves = [call for call in calls if call.func.attr == "to" and "'cpu'" in ast.unparse(call)]
    return [ast.unparse(call) for call in waits + moves]


def untrusted_loads(source: str) -> list[str]:
    """pickle in any dress, and torch.load without weights_only=True."""
    bad = [name for name in imports(source) if name.split(".")[0] in ("pickle", "dill", "joblib", "shelve")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            unsafe = ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True
            bad += [ast.unparse(node)] if unsafe or given.get("allow_pickle") else []
    return bad


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.fixture(params=FILES, ids=name_of)
def path(request):
    return request.param


def test_a_module_imports_only_what_its_room_may(path):
    assert broken_imports(name_of(path), read(path)) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle({name_of(p): ours(read(p)) for p in FILES}) == []


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).split(".")[0] in IGNORANT], ids=name_of)
def test_the_loop_and_what_measures_name_no_method(path):
    assert named_methods(read(path)) == []


def test_a_file_is_read_in_one_sitting(path):
    assert len(read(path).splitlines()) <= 250


def test_a_function_fits_on_a_screen(path):
    assert long_functions(read(path)) == []


def test_an_import_does_nothing(path):
    assert side_effects(read(path)) == []


def test_nothing_is_unpickled(path):
    assert untrusted_loads(read(path)) == []


IN_A_STEP = FOR_METHODS - {"errors", "method"} | {"optim"}
STEP = [p for p in FILES if "methods" in p.parts or name_of(p) in IN_A_STEP]


@pytest.mark.parametrize("path", STEP, ids=name_of)
def test_nothing_in_a_step_makes_a_gpu_wait(path):
    assert synchronising_calls(read(path)) == []


def test_every_file_says_what_it_is_for(path):
    assert path.stem not in ("utils", "helpers", "common", "misc")


def test_the_package_holds_python_only():
    assert {p.suffix for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == {".py"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods.dino", "from minissl.methods.simclr import nt_xent"),
        ("methods.dino", "from minissl.methods.dinov2 import koleo"),
        ("methods.dinov2", "from minissl.methods.dinov3 import gram_loss"),
        ("methods.simclr", "from minissl.methods import dino"),
        ("methods.dino", "from minissl.train import fit"),
        ("methods.dino", "from minissl import checkpoint"),
        ("methods.dino", "def loss():\n    from minissl import train"),
        ("methods.dino", "from .dinov2 import koleo"),
        ("methods.dino", "from . import dinov2"),
        ("methods.dino", "import importlib\nimportlib.import_module('minissl.train')"),
        ("train", "import minissl.methods.dino"),
        ("train", "from minissl import runs"),
        ("train", "from minissl import doctor"),
        ("doctor", "from minissl.evaluate import rank_me"),
        ("evaluate.classify", "from minissl.methods import dino"),
        ("evaluate.classify", "from minissl import train, runs"),
        ("visualize.pca", "from minissl.methods.dino import DINO"),
        ("visualize.pca", "import minissl.train as loop"),
        ("data.scenes", "from minissl.vit import vit"),
        ("data.sources", "from minissl.evaluate import knn"),
        ("vit", "from tests.golden import wave"),
        ("views", "import chapters.solutions"),
        ("augment", "from minissl.views import multi_crop"),
        ("views", "from minissl.vit import vit"),
        ("color", "from minissl.augment import grey"),
        ("optim", "from minissl.train import TrainConfig"),
        ("parallel", "from minissl.method import Batch"),
        ("methods.simclr", "from minissl.optim import LARS"),
        ("film", "from minissl.train import learn"),
        ("film", "from minissl.visualize import film_figure"),
        ("survey", "from minissl.evaluate import extract"),
        ("advise", "from minissl.data import load"),
        ("advise", "from minissl.page import write"),
        ("album", "from minissl.visualize import pca_rgb"),
        ("markup", "from minissl import album"),
        ("page", "from minissl import runs"),
        ("train", "from minissl import page"),
        ("machine", "import minissl"),
    ],
)
def test_a_broken_import_is_seen(module, source):
    assert broken_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods.dinov2", "from minissl.methods.dino import DINO\nimport torch"),
        ("methods.dinov3", "from minissl.methods import dino"),
        ("methods.dino", "from minissl.views import multi_crop"),
        ("methods.simclr", "from minissl.parallel import gather_rows"),
        ("methods.pretext", "from minissl.color import gamut"),
        ("views", "from minissl.augment import flip"),
        ("train", "from minissl.method import Batch\nfrom minissl import checkpoint"),
        ("visualize.attention", "from minissl.evaluate.attention import mass_mask"),
        ("film", "from minissl.evaluate import fine_attention\nfrom minissl import checkpoint"),
        ("advise", "from minissl.survey import Facts\nfrom minissl.method import find"),
        ("page", "from minissl.album import Album\nfrom minissl.visualize import pca_rgb"),
        ("runs", "from minissl.methods import dino\nimport minissl_of_someone_else"),
    ],
)
def test_an_allowed_import_is_not(module, source):
    assert broken_imports(module, source) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}}) == []


def test_a_named_method_is_seen():
    name, kind = next(iter(METHODS.items()))
    assert named_methods(f"if method == '{name}':\n    pass") == [name]
    assert named_methods(f"isinstance(method, {kind})") == [kind]
    assert named_methods(f"def f():\n    '''{name}'''\n    x = 1  # {name}") == []


def test_a_long_function_is_seen():
    assert long_functions("def f():\n" + "    x = 1\n" * 40) == ["f"]
    assert long_functions("def f():\n" + "    x = 1\n" * 39) == []
    assert long_functions("def f():\n    '''" + "\n" * 60 + "'''\n    return 1\n") == []


@pytest.mark.parametrize("line", ["print('hello')", "torch.manual_seed(0)", "for i in x: pass", "if DEBUG:\n    f()"])
def test_a_side_effect_is_seen(line):
    assert side_effects(f"import os\n{line}") == [2]


@pytest.mark.parametrize("call", ["loss.item()", "x.cpu()", "x.numpy()", "x.tolist()", "x.to('cpu')"])
def test_a_call_that_waits_is_seen(call):
    assert synchronising_calls(f"def loss():\n    return {call}")


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "import pickle", "np.load(p, allow_pickle=True)"],
)
def test_an_untrusted_load_is_seen(line):
    assert untrusted_loads(line)
    assert untrusted_loads("torch.load(p, weights_only=True)") == []
