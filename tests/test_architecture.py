"""Rules of the code base: imports (import-linter), sizes, no side effects at import, no untrusted loads, no GPU waits.

Each rule is a pure function of a source and is tried on a source that breaks it.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minissl"
FILES = sorted(PACKAGE.rglob("*.py"))
SYNCHRONIZING = {"item", "cpu", "numpy", "tolist", "nonzero", "synchronize"}
MODELS_OF_A_STEP = ("layers", "vit", "heads", "ema", "convnets", "text_encoder", "position_encoding")
WAIT_FREE = ("methods", "data/transforms", "training/optimizers.py", *(f"models/{m}.py" for m in MODELS_OF_A_STEP))
NOT_IN_A_STEP = ("methods/registry.py",)
PLANTED = {  # rule of pyproject.toml: a file, and an import that breaks the rule
    "base": ("distributed.py", "from minissl.models.vit import vit"),
    "models": ("models/heads.py", "from minissl.methods.losses import koleo_loss"),
    "methods": ("methods/simclr.py", "from minissl.training.trainer import learn"),
    "data": ("data/images.py", "from minissl.evaluation.classification import knn"),
    "evaluation": ("evaluation/benchmark.py", "from minissl.methods.dino import DINO"),
    "metrics": ("evaluation/features.py", "from minissl.visualization.pca import pca_rgb"),
    "hub": ("hub/pretrained.py", "from minissl.training.run import RunConfig"),
    "loop": ("training/trainer.py", "from minissl.methods.dino import DINO"),
    "training": ("training/run.py", "from minissl.reports.html import write_report"),
    "reports": ("reports/html.py", "from minissl.cli import main"),
    "notebook": ("notebook/widgets.py", "from minissl.cli import main"),
    "papers": ("methods/dino.py", "from minissl.methods.simclr import nt_xent"),
}


def lint_imports(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run([*command, "--no-cache", *options], cwd=folder, capture_output=True, text=True)


def test_import_rules_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_import_breaks_its_rule(rule, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "minissl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, line = PLANTED[rule]
    with open(tmp_path / "minissl" / file, "a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    assert lint_imports(tmp_path, "--contract", rule).returncode == 1


def test_every_rule_has_a_planted_import():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rules = {line.split('"')[1] for line in text.splitlines() if line.startswith("id = ")}
    assert rules == set(PLANTED)


def has_docstring(node: ast.AST) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def long_functions(source: str, limit: int = 40) -> list[str]:
    """Functions of more than `limit` lines without their docstring."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring(node) else 0
            names += [node.name] if node.end_lineno - node.lineno + 1 - doc > limit else []
    return names


def side_effects(source: str) -> list[int]:
    """Lines at a module's top level that do something when it is imported."""
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    lines = []
    for node in ast.parse(source).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        lines += [] if text or guard or isinstance(node, quiet) else [node.lineno]
    return lines


def synchronizing_calls(source: str) -> list[str]:
    """Calls that make a GPU wait, or move data back from it."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    waits = [call for call in calls if call.func.attr in SYNCHRONIZING]
    moves = [call for call in calls if call.func.attr == "to" and "'cpu'" in ast.unparse(call)]
    return [ast.unparse(call) for call in waits + moves]


def untrusted_loads(source: str) -> list[str]:
    """Uses of pickle in any form, and of torch.load without weights_only=True."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad += [alias.name for alias in node.names if alias.name.split(".")[0] in ("pickle", "dill", "joblib")]
        elif isinstance(node, ast.ImportFrom):
            bad += [node.module] if (node.module or "").split(".")[0] in ("pickle", "dill", "joblib", "shelve") else []
        elif isinstance(node, ast.Call):
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            unsafe = ast.unparse(node.func) == "torch.load" and options.get("weights_only") is not True
            bad += [ast.unparse(node)] if unsafe or options.get("allow_pickle") else []
    return bad


def offenders(rule, files=FILES) -> dict[str, list]:
    """What a rule finds, by file."""
    found = {str(path.relative_to(PACKAGE)): rule(path.read_text(encoding="utf-8")) for path in files}
    return {name: bad for name, bad in found.items() if bad}


def in_a_step(path: Path) -> bool:
    name = path.relative_to(PACKAGE).as_posix()
    return name.startswith(WAIT_FREE) and name not in NOT_IN_A_STEP


def test_files_are_short():
    sizes = {path.relative_to(PACKAGE).as_posix(): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {n: size for n, size in sizes.items() if size > (250 if n.startswith("methods/") else 500)} == {}


def test_functions_are_short():
    assert offenders(long_functions) == {}


def test_imports_have_no_side_effects():
    assert offenders(side_effects) == {}


def test_nothing_untrusted_is_unpickled():
    assert offenders(untrusted_loads) == {}


def test_a_training_step_never_makes_a_gpu_wait():
    files = [path for path in FILES if in_a_step(path)]
    assert len(files) > 15
    assert offenders(synchronizing_calls, files) == {}


def test_top_level_of_the_package_is_small():
    tracked = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert len(tracked) <= 15, sorted(tracked)
    assert not {"utils.py", "helpers.py", "common.py"} & {path.name for path in FILES}


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * 40),
        (side_effects, "import os\nprint('hello')"),
        (side_effects, "import torch\ntorch.manual_seed(0)"),
        (synchronizing_calls, "def loss():\n    return x.item()"),
        (synchronizing_calls, "def loss():\n    return x.to('cpu')"),
        (untrusted_loads, "torch.load(path)"),
        (untrusted_loads, "torch.load(path, weights_only=False)"),
        (untrusted_loads, "import pickle"),
        (untrusted_loads, "np.load(path, allow_pickle=True)"),
    ],
)
def test_a_rule_finds_what_breaks_it(rule, source):
    assert rule(source)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_functions, "def f():\n    '''" + "\n" * 60 + "'''\n    return 1\n"),
        (side_effects, "if TYPE_CHECKING:\n    import torch"),
        (synchronizing_calls, "def loss():\n    return x.sum()"),
        (untrusted_loads, "torch.load(path, weights_only=True)"),
    ],
)
def test_a_rule_accepts_what_keeps_it(rule, source):
    assert rule(source) == []
