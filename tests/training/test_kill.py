"""SIGKILL at random instants, some inside a save, each followed by the same command: the final state is the same.

More of them: python tests/training/test_kill.py 25
"""

import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest

from cifar10 import train_ce, train_kd
from cifar10.models import MODELS
from distill.files import checkpoint
from tests.forked import Command, Server


def kd_flags(npz: Path, teacher: Path, output: Path) -> list[str]:
    """A small KD run of EfficientNet-B0 that saves after every step."""
    flags = ["--data", npz, "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", teacher, "--output", output]
    flags += ["--batch-size", 8, "--epochs", 4, "--save-minutes", 0, "--device", "cpu"]
    return list(map(str, flags))


def final_state(path: Path) -> str:
    """Digest of weights, optimiser, generators and metrics; without the clock's readings."""
    payload = checkpoint.load(path / "last.pt")
    assert payload.pop("timings")
    for record in payload["records"]:
        del record["seconds"], record["images_per_second"]
    return checkpoint.digest(payload)


def run_with_kills(server: Server, flags: list[str], output: Path, kills: int, seed: int) -> int:
    """Kill `kills` times, every second time inside a save, then let it end. Kills inside a save."""
    chance, inside = random.Random(seed), 0
    done = 0
    while done < kills:
        saves = {path: path.stat().st_mtime_ns for path in output.glob("*.pt")}
        process = server.start(["cifar10/train_kd.py", *flags], output.parent / "errors")
        while process.poll() is None and {p: p.stat().st_mtime_ns for p in _listed(output)} == saves:
            time.sleep(0.002)  # until this process has saved once, so that ten kills in a row make progress too
        if done % 2:
            stop_inside_a_save(process, output)
        else:
            time.sleep(chance.uniform(0, 0.25))  # a step and its save; longer, a fast machine would be done too soon
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        errors = process.wait()
        assert not ended, f"the run ended before kill {done + 1}: {errors!r}"
        inside += bool(list(output.glob(f"*{checkpoint.TEMPORARY}")))
        done += 1
    train_kd.main(flags)
    return inside


def stop_inside_a_save(process: Command, output: Path) -> None:
    """Let the process go on until it stands still while a checkpoint is half written, or has ended."""
    name = f"{checkpoint.LAST}*{checkpoint.TEMPORARY}"
    while process.poll() is None:
        if list(output.glob(name)) and process.stop():
            if list(output.glob(name)):
                return
            process.send_signal(signal.SIGCONT)


def _listed(output: Path) -> list[Path]:
    return [path for path in output.glob("*.pt") if path.exists()]


def check(server: Server, directory: Path, npz: Path, kills: int, seed: int) -> int:
    teacher = directory / "teacher.pth"
    checkpoint.save(teacher, {"student": MODELS.build("densenet_cifar", 4).state_dict()})
    whole, killed = directory / "whole", directory / "killed"
    train_kd.main(kd_flags(npz, teacher, whole))  # here: a process of its own takes seconds to start
    inside = run_with_kills(server, kd_flags(npz, teacher, killed), killed, kills, seed)
    assert final_state(killed) == final_state(whole)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    results = [json.loads((path / "summary.json").read_text()) for path in (whole, killed)]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["agreement"] == results[1]["agreement"]
    assert not list(killed.glob(f"*{checkpoint.TEMPORARY}"))
    return inside


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.mark.slow
def test_five_kills(server: Server, small_npz: Path, tmp_path: Path) -> None:
    assert check(server, tmp_path, small_npz, kills=5, seed=0) >= 2


@pytest.mark.slow
def test_sigterm_exits_with_143_and_the_same_command_continues(
    server: Server, small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", small_npz, "--batch-size", 8, "--epochs", 4, "--save-minutes", 0, "--output", tmp_path / "run"]
    flags = list(map(str, given))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        saves = {p: p.stat().st_mtime_ns for p in _listed(tmp_path / "run")}
        process = server.start(["cifar10/train_ce.py", *flags], tmp_path / "errors")
        while process.poll() is None and {p: p.stat().st_mtime_ns for p in _listed(tmp_path / "run")} == saves:
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.wait()
        assert process.returncode == code, errors
        assert errors.count("\n") == 1
        assert f"stopped by {number.name}" in errors
    train_ce.main(flags)
    assert "continuing at epoch" in capsys.readouterr().out
    train_ce.main(flags)
    assert "finished before" in capsys.readouterr().out


if __name__ == "__main__":
    import tempfile

    import numpy as np

    from cifar10.data import load_data

    with tempfile.TemporaryDirectory() as name:
        data = load_data("sample")
        chosen = [i for k in range(4) for i in range(200 * k, 200 * k + 30)]
        npz = Path(name) / "small.npz"
        arrays = {"train_images": data.train_images[chosen].numpy(), "train_labels": data.train_labels[chosen].numpy()}
        np.savez(npz, test_images=arrays["train_images"][:9], test_labels=arrays["train_labels"][:9] % 4, **arrays)
        count = int(sys.argv[1]) if len(sys.argv) > 1 else 25
        inside = check(Server(), Path(name), npz, count, seed=1)
        print(f"{count} kills, {inside} of them inside a save: final state identical")
