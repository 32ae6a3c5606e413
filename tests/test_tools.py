"""The scripts beside training: filling and keeping stores, a sweep, the benchmark."""

import hashlib
import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifar10 import teachers, train_ce, train_kd
from cifar10.models import CIFAR_INPUT
from distill.errors import UserError
from distill.registry import Classifier
from scripts import benchmark, model_size, precompute, publish, results, sweep
from tests.conftest import ROOT, teacher_file

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


@pytest.mark.parametrize("method", [["--method", "dist"], ["--overhaul"], ["--kd-weight", "9", "--ce-weight", "0.1"]])
def test_answers_do_not_depend_on_the_method(
    method: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    precompute.main([*flags, "--views", "1"])
    capsys.readouterr()
    assert precompute.main([*flags, "--views", "1", *method]) == 0
    assert "0 of them answered by this call" in capsys.readouterr().out
    with pytest.raises(UserError, match="a sweep goes through --T and --w of --method kd"):
        sweep.main([*flags, *method])


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


# ------------------------------------------------------------------------------------------------- the results' tables
def test_the_tables_in_the_readme_are_those_of_the_records() -> None:
    assert results.main(["--check"]) == 0


def test_tables_from_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means and deviations over seeds, differences, dashes for what is missing; a stale table is told."""
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    found = {"epochs": 3, "wall_seconds": 12.4, "device": "cpu, 2 threads", "test_accuracy": 90.0}
    runs = {"teacher-resnet18-seed0": 95.0, "student-seed0": 90.0, "student-seed1": 91.0}
    runs |= {f"student-kd-resnet18-seed{k}": 92 + 0.5 * k for k in range(3)}
    for name, accuracy in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"recipe": {"arch": "x"}}))
        (tmp_path / name / "summary.json").write_text(json.dumps({**found, "test_accuracy": accuracy}))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text("{}")
    results.main(["--record", "short", *(str(tmp_path / name) for name in [*runs, "cut"])])
    assert f"{tmp_path}/cut is not finished: not recorded" in capsys.readouterr().out
    lines = results.table("short")
    assert lines[2] == "| none: CE | | 90.50 +- 0.71 (90.67) | | | | 3 | 12 | 2 |"
    assert lines[3] == "| resnet18 | 95.00 | 92.50 +- 0.50 | +2.00 | +2.50 | - | 3, 3 | 12, 12 | 3 |"
    assert results.table("full")[3] == "| resnet152 | - (92.41) | - (92.12) | - | - | - | -, - | -, - | - |"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results.MARKERS[0]}\nold\n{results.MARKERS[1]}\nafter\n")
    assert results.main(["--check"]) == 1
    assert results.main([]) == 0
    assert results.main(["--check"]) == 0
    text = readme.read_text()
    assert lines[3] in text
    assert (text.startswith("before\n"), text.endswith("\nafter\n"), "old" in text) == (True, True, False)
    readme.write_text("no place")
    with pytest.raises(UserError, match=r"README.md must have one line"):
        results.main([])
    (tmp_path / "records" / "short" / "student-seed7.json").write_text("{}")
    with pytest.raises(UserError, match=r"student-seed7.json is no record of a run"):
        results.table("short")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "bash scripts/reproduce.sh cifar10 [flags]: the table of no data set is not known"),
        (("cifar10", "--budget", "huge"), "--budget must be full or short, got huge"),
        (("cifar10", "--seeds", "0"), "--seeds must be an integer, at least 1, got 0"),
        (("cifar10", "--only"), "--only wants a value"),
        (("cifar10", "--only", "teacher-vgg"), "--only must be one of student teacher-resnet152"),
        (("cifar10", "--lr", "x", "--only", "student"), "--lr must be a number"),
    ],
)
def test_mistakes_of_reproduce(flags: tuple[str, ...], message: str) -> None:
    found = subprocess.run(["bash", "scripts/reproduce.sh", *flags], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_reproduce_trains_what_a_row_needs(small_npz: Path, home: Path) -> None:
    flags = [
        "--budget",
        "short",
        "--only",
        "student-kd-resnet18",
        "--data",
        str(small_npz),
        "--batch-size",
        "8",
    ]
    command = ["bash", "scripts/reproduce.sh", "cifar10", *flags, "--arch", "resnet18", "--steps", "1"]
    environment = {**os.environ, "DISTILL_CHECKPOINTS": str(home)}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    runs = [line.removeprefix("== ") for line in found.stdout.splitlines() if line.startswith("==")]
    assert runs == ["teacher-resnet18-seed0", "student-kd-resnet18-seed0"]
    assert sorted(path.name for path in (home / "cifar10-short").iterdir()) == sorted(runs)
    assert found.stdout.count("not recorded") == 2
    recipe = json.loads((home / "cifar10-short" / runs[1] / "config.json").read_text())["recipe"]
    assert (recipe["T"], recipe["epochs"], recipe["lr"]) == (4.0, 20, 0.1)


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand for a network of one convolution, BatchNorm and linear layer; the table of two."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = Classifier(nn.Sequential(*layers, nn.Linear(4, 10)), CIFAR_INPUT).eval()
    parameters, activations, macs = model_size.count(network)
    assert parameters == 3 * 4 * 9 + 2 * 4 + 4 * 10 + 10
    assert activations == 2 * 4 * 32 * 32
    assert macs == 32 * 32 * 4 * 3 * 9 + 4 * 10
    file = tmp_path / "sizes.json"
    model_size.main(
        ["--arch", "densenet40", "--vs", "resnet18", "--rounds", "1", "--batch-size", "2", "--json", str(file)]
    )
    found = json.loads(file.read_text())
    assert [size["parameters"] for size in found] == [1059298, 11173962]
    assert all(1.8 < size["bytes_float32"] / size["bytes_float16"] < 2 for size in found)
    assert "| share | 1054.85 % |" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown architecture 'resnet1'"):
        model_size.main(["--arch", "resnet1"])


def test_published_weights(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """float16, measured from the file, a line for each file, found by its architecture."""
    monkeypatch.setattr(teachers, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("Text.\n")
    data = ["--data", str(small_npz)]
    flags = [*data, "--arch", "densenet_cifar", "--epochs", "1", "--batch-size", "8", "--ema", "0.9"]
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is none of densenet_cifar, but of nothing"):
        train_kd.main([*flags, "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", "published"])
    train_ce.main([*flags, "--output", str(run)])
    for _ in range(2):
        publish.main([str(run), *data])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Text.\n\n| file | trained by |")
    assert text.count("| `densenet_cifar-ce.pt` | CE | small |") == 1
    file = tmp_path / "published" / "densenet_cifar-ce.pt"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    saved = torch.load(file, weights_only=True)
    average = torch.load(run / "last.pt", weights_only=True)["average"]
    assert all(torch.equal(saved["student"][key], average[key].half()) for key in average if "num" not in key)
    capsys.readouterr()
    train_kd.main([*flags, "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", "published"])
    said = capsys.readouterr().out
    accuracy = re.search(r"\| small \| ([\d.]+) % \|", text)
    assert accuracy
    assert f"teacher: densenet_cifar from {file}, test accuracy {accuracy[1]} %" in said
    with pytest.raises(UserError, match="is no directory of a finished run"):
        publish.main([str(tmp_path), *data])
