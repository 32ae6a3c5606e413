"""The architecture, held by tests: imports run one way, entry scripts are thin, one loop."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from distill.losses import FEATURES, METHODS

ROOT = Path(__file__).resolve().parent.parent
DISTILL = sorted((ROOT / "distill").rglob("*.py"))
MODULES = sorted(p for folder in ("distill", "cifar10", "imagenet", "scripts") for p in (ROOT / folder).rglob("*.py"))
ENTRIES = sorted(ROOT.glob("*/train_*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert not any(alias.name == "*" for alias in node.names), f"{path}: star import"
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    forbidden = {"distill": ("cifar10", "imagenet", "scripts"), "cifar10": ("imagenet", "scripts")}
    forbidden |= {"imagenet": ("cifar10", "scripts"), "scripts": ()}
    names = imported(path)
    if path == ROOT / "cifar10" / "models" / "__init__.py":  # ImageNet's networks can be trained on small images
        names -= {"imagenet.models"}
    packages = {name.split(".")[0] for name in names}
    assert not packages & set(forbidden[path.relative_to(ROOT).parts[0]])


LAYERS = (
    "losses",
    "files",
    "config",
    "parallel",
    "data",
    "models",
    "run",
    "teacher",
    "features",
    "training",
    "inference",
    "export",
    "report",
)
"""The packages of distill, from the bottom to the top: each may know those before it."""


def packages(path: Path) -> set[str]:
    """The packages of distill that a file imports from; the files beside them count by their names."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("distill.")}


@pytest.mark.parametrize("path", DISTILL, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_know_those_below_them(path: Path) -> None:
    own = path.relative_to(ROOT / "distill").parts[0].removesuffix(".py")
    allowed = set(LAYERS[: LAYERS.index(own) + 1]) if own in LAYERS else set[str]()
    assert packages(path) <= allowed | {"errors", "options", "lazy"}


def test_packages_are_small() -> None:
    """Eight files at most, not counting that each method has its own."""
    losses = {method.__module__.rpartition(".")[2] for method in (*METHODS.values(), *FEATURES.values())}
    for package in LAYERS:
        names = {p.stem for p in (ROOT / "distill" / package).glob("*.py")} - {"__init__"}
        assert len(names - losses if package == "losses" else names) <= 8


def test_no_circles_in_distill() -> None:
    def modules(path: Path) -> set[str]:
        known = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in DISTILL}
        return {k for name in imported(path) for k in known if name == k or name.startswith(f"{k}.")}

    left = {str(p.relative_to(ROOT).with_suffix("")).replace("/", "."): modules(p) for p in DISTILL}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"these import each other: {left}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("path", ENTRIES, ids=lambda p: str(p.relative_to(ROOT)))
def test_entry_scripts_show_the_steps(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) < 80
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While, ast.ClassDef))]
    assert not [n for n in imported(path) if n.startswith("torch")]
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    steps = [node for node in train.body if not isinstance(node, (ast.ImportFrom, ast.Expr))]
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in steps) <= 25
    for word in ("build_student", "prepare", "open_run", "loss", "fit", "finish"):
        assert word in ast.unparse(train)


def test_one_backward() -> None:
    """Training has one loop; the benchmark has those of others, to compare with."""
    where = [
        p.name for p in MODULES for n in ast.walk(ast.parse(p.read_text())) if ast.unparse(n).endswith(".backward()")
    ]
    assert set(where) == {"engine.py", "benchmark_peers.py"}


def test_flags_are_parsed_before_torch_is_loaded() -> None:
    packages = [f"{kind}.{entry}" for kind in ("cifar10", "imagenet") for entry in ("train_ce", "train_kd", "recipes")]
    modules = ", ".join([*packages, "distill.config.cli", "scripts.dataset", "scripts.trained"])
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
