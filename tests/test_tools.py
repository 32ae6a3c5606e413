"""The scripts beside training: filling and keeping stores, a sweep, the benchmark."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cifar10 import train_kd
from distill.errors import UserError
from scripts import benchmark, precompute, sweep
from tests.conftest import teacher_file

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def flags(small_npz: Path, tmp_path: Path) -> list[str]:
    teacher = teacher_file(tmp_path / "teacher.pth")
    return ["--data", str(small_npz), "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", teacher]


def test_precompute_fills_what_training_reads(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert precompute.main([*flags, "--views", "2"]) == 0
    assert "80 views are in" in capsys.readouterr().out
    assert precompute.main([*flags, "--views", "3"]) == 0
    said = capsys.readouterr().out
    assert "view 2 of 3: 0 answered by this call" in said
    assert "120 views are in" in said
    assert "40 of them answered by this call" in said
    train_kd.main([*flags, "--arch", "densenet_cifar", "--epochs", "3", "--batch-size", "8"])
    assert "0 views answered, the others were in the store" in capsys.readouterr().out


def test_stores_are_listed_verified_and_removed(
    flags: list[str], home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert precompute.main(["--list"]) == 0
    assert capsys.readouterr().out == "there are no stores\n"
    precompute.main([*flags, "--views", "2"])
    capsys.readouterr()
    precompute.main(["--list"])
    shown = capsys.readouterr().out
    name = shown.split(":")[0]
    assert re.search(r"^small-densenet_cifar-\w{16}: [\d.]+ kB, 2 views, 80 answers\n  \{.*crop_flip", shown)
    assert precompute.main([*flags, "--verify", "30"]) == 0
    assert "30 answers asked again: 30 the same to the bit, largest difference 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no store 'x'"):
        precompute.main(["--prune", "x"])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="--yes removes without asking"):
        precompute.main(["--prune", name])
    for answer, left in (("n\n", True), ("y\n", False)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        precompute.main(["--prune", name])
        assert (home / "stores" / name).exists() == left


def test_verify_finds_a_wrong_answer(flags: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole files with other numbers in them: only asking again can tell."""
    from distill import checkpoint

    precompute.main([*flags, "--views", "1"])
    (path,) = (home / "stores").glob("*/0*.pt")
    segment = checkpoint.load(path)
    segment["rows"][3] += 1
    checkpoint.save(path, segment)
    assert precompute.main([*flags, "--verify", "40"]) == 1
    assert "40 answers asked again: 39 the same" in capsys.readouterr().out


def test_precompute_refuses(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--store-limit GB allows more"):
        precompute.main([*flags, "--store-limit", "0"])
    with pytest.raises(UserError, match="unknown argument --verfy; near it: --verify"):
        precompute.main([*flags, "--verfy", "3"])


def test_sweep(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--arch", "densenet_cifar", "--epochs", "1", "--batch-size", "8", "--T-list", "1,4", "--w-list", "0.5"]
    sweep.main([*flags, *more])
    said = capsys.readouterr().out
    assert "40 views answered" in said
    assert "0 views answered" in said
    assert len(re.findall(r"^\| [14] \| 0.5 \| [\d.]+ % \| [\d.]+ % \| \d+ \|$", said, flags=re.MULTILINE)) == 2
    sweep.main([*flags, *more])
    assert capsys.readouterr().out.count("finished before") == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--T-list", "1;2"], "--T-list must be numbers with commas"),
        (["--w-list", "0.5,2"], "--w must be a number, at least 0, at most 1"),
        (["--output", "x"], "--output names one run"),
    ],
)
def test_sweep_refuses(wrong: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(wrong)


def test_benchmark(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    small = ("--arch", "densenet_cifar", "--teacher-arch", "densenet_cifar", "--batch-size", 4, "--device", "cpu")
    found = command("scripts/benchmark.py", *small, "--rounds", 1, "--seconds", 0, "--json", file)
    assert found.returncode == 0, found.stderr
    figures = json.loads(file.read_text())
    assert list(figures) == ["original", "original_eval", "usual", "ce", "empty_store", "full_store"]
    for row in figures.values():
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["peak_memory"] > 1e8
    assert figures["original"]["to_original"] == figures["ce"]["to_ce"] == 1
    assert found.stdout.count("\n| ") == 7


def test_figures_of_the_benchmark() -> None:
    seconds = {"original": [8.0, 10.0, 12.0], "ce": [1.0, 1.0, 2.0]}
    found = benchmark.summarise(seconds, {"original": 1.0, "ce": 2.0}, 100)
    assert found["original"]["images_per_second"] == 10
    assert found["ce"]["to_original"] == 8
    assert found["ce"]["to_original_range"] == [6, 10]
    assert found["original"]["to_ce"] == 1 / 8


def test_benchmark_refuses() -> None:
    for wrong, message in (
        (["--arch", "vgg"], "unknown architecture"),
        (["--json", "/nowhere/x"], "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.main([*wrong, "--device", "cpu"])
