"""The shell scripts, from any directory: flags pass through, relative paths are the caller's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ["trainCE.sh", "trainKD.sh"]


def bash(script: str, *arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    settings = {**os.environ, **environment}
    command = ["bash", script, *arguments]
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_from_several_directories(launcher: str, tmp_path: Path) -> None:
    results = [
        bash(f"scripts/{launcher}", "--show-recipe", cwd=ROOT),
        bash(launcher, "--show-recipe", cwd=ROOT / "scripts"),
        bash(str(ROOT / "scripts" / launcher), "--show-recipe", cwd=tmp_path, CDPATH="/tmp:/"),
    ]
    assert [r.returncode for r in results] == [0, 0, 0]
    assert '"arch": "efficientnet_b0"' in results[0].stdout
    assert results[0].stdout == results[1].stdout == results[2].stdout
    assert ('"teacher_arch": "resnext29_2x64d"' in results[0].stdout) == (launcher == "trainKD.sh")


def test_relative_paths_are_the_callers(small_npz: Path, tmp_path: Path) -> None:
    shutil.copy(small_npz, tmp_path / "with space.npz")
    flags = ("--data", "with space.npz", "--output", "my run", "--batch_size", "8", "--epochs", "1", "--steps", "1")
    found = bash(str(ROOT / "scripts" / "trainCE.sh"), *flags, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "my run" / "last.pt").exists()


def test_python_of_the_caller_without_a_venv(tmp_path: Path) -> None:
    """A copy of the repository without .venv takes $PYTHON."""
    for folder in ("scripts", "distill", "cifar10"):
        shutil.copytree(ROOT / folder, tmp_path / "copy of it" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = str(tmp_path / "copy of it" / "scripts" / "trainCE.sh")
    assert bash(script, "--show-recipe", cwd=tmp_path, PYTHON=sys.executable).returncode == 0
    assert bash(script, "--show-recipe", cwd=tmp_path, PYTHON="/bin/false").returncode == 1


@pytest.mark.parametrize("words", [["-m", "cifar10.train_kd"], ["cifar10/train_kd.py"], ["scripts/evaluate.py"]])
def test_python_ways_to_call(words: list[str]) -> None:
    found = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert "--arch" in found.stdout
