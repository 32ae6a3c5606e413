"""The benchmark: its figures, its rows, and the steps of other programs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.errors import UserError
from scripts import benchmark

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.slow
def test_benchmark(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    small = ("--arch", "airbench94", "--teacher-arch", "airbench94", "--batch-size", 4, "--device", "cpu")
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


def test_the_fastest_peer_in_the_figures_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"original": [8.0, 8.0], "ce": [1.0, 1.0], "torchdistill": [6.0, 6.0], "timm": [4.0, 5.0]}
    found = benchmark.summarise(seconds, dict.fromkeys(seconds, 1.0), 100)
    assert found["timm"]["to_fastest_peer"] == 1
    assert found["ce"]["to_fastest_peer"] == 4.5
    assert found["ce"]["to_fastest_peer_range"] == [4, 5]
    benchmark.show(found)
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "times the fastest peer (timm)" in title
    assert "| 4.50 (4.00 to 5.00) |" in rows[1]


def test_some_rows_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.chosen(benchmark.Benchmark(only="sp,full_store")) == ("ce", "full_store", "sp")
    with pytest.raises(UserError, match=r"--only must be of original, .*, got 'sq'"):
        benchmark.chosen(benchmark.Benchmark(only="sp,sq"))
    found = benchmark.summarise({"ce": [1.0], "sp": [2.0]}, {"ce": 1.0, "sp": 1.0}, 100)
    assert (found["sp"]["to_ce"], "to_original" in found["sp"]) == (0.5, False)
    benchmark.show(found)
    assert "original" not in capsys.readouterr().out


def network_of_a_test() -> nn.Module:
    convolution = nn.Conv2d(3, 4, 3, 2, bias=False)  # BatchNorm takes a bias away again: it would not learn
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize("row", ["torchdistill", "timm"])
def test_a_step_of_a_library_is_ours(row: str) -> None:
    """From the same weights, on 8 equal images so that their order plays no part, the same student comes out."""
    pytest.importorskip(benchmark.PEERS[row])
    from scripts import benchmark_peers

    torch.manual_seed(0)
    student, teacher, image = network_of_a_test(), network_of_a_test().eval(), torch.randn(3, 32, 32)
    images = [(image, 3)] * 8
    learned = []
    for name in ("original_eval", row):
        own = copy.deepcopy(student)
        steps = benchmark_peers.LOOPS[name](own, copy.deepcopy(teacher), images, 8, torch.device("cpu"))
        next(steps)
        learned.append(torch.cat([parameter.detach().flatten() for parameter in own.parameters()]))
    assert not torch.equal(learned[0], torch.cat([parameter.flatten() for parameter in student.parameters()]))
    assert (learned[0] - learned[1]).abs().max() < 1e-5


@pytest.mark.parametrize("row", ["original", "original_eval", "usual", *benchmark.PEERS])
def test_a_step_of_other_programs(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student learns; of the teacher only BatchNorm's statistics may move, and only in the original."""
    pytest.importorskip(benchmark.PEERS.get(row, "torch"))
    from scripts import benchmark_peers

    monkeypatch.setattr(benchmark_peers, "LOADER", {"num_workers": 0, "drop_last": True})
    torch.manual_seed(0)
    student, teacher = network_of_a_test(), network_of_a_test()
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in (student, teacher)]
    step = benchmark_peers.LOOPS[row](student, teacher, benchmark_peers.Images(), 8, torch.device("cpu"))
    next(step)
    learned, changed = (
        {name for name, value in net.state_dict().items() if not torch.equal(value, old[name])}
        for net, old in zip((student, teacher), before, strict=True)
    )
    assert learned == set(student.state_dict())
    assert changed == ({name for name, _ in teacher.named_buffers()} if row == "original" else set())


def test_benchmark_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in benchmark.PEERS:
        monkeypatch.setitem(benchmark.PEERS, row, "peer_that_is_absent")
    for wrong, message in (
        (["--arch", "vgg"], "unknown architecture"),
        (["--json", "/nowhere/x"], "no such directory"),
        (["--peers"], "the rows of peers need peer_that_is_absent: pip install peer_that_is_absent"),
        (["--json", "x" * 300], "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.main([*wrong, "--device", "cpu"])
