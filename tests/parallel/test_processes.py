"""Several processes as one run, started by torchrun: the same gradient, the same counts, the same end after a kill."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

from cifar10 import train_ce
from cifar10.data import load_data, prepare
from distill.config.recipe import Recipe
from distill.data.order import EpochPlan
from distill.errors import UserError
from distill.files import checkpoint
from distill.losses import FEATURES
from distill.parallel import devices
from distill.parallel import processes as joined
from distill.training import wrap
from distill.training.stop import Stopped
from tests.training.test_kill import final_state

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FLAGS = ["--arch", "densenet_cifar", "--batch-size", "8", "--epochs", "3", "--device", "cpu"]


@pytest.mark.parametrize(("code", "expected"), [(None, ["left"]), (0, ["left"]), (143, [])])
def test_who_has_done_good_work_leaves_the_others(
    code: int | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after --steps, which ends by an exception."""
    ended: list[str] = []
    monkeypatch.setattr(joined, "_leave", lambda: ended.append("left"))
    try:
        with joined.leaving():
            if code is not None:
                raise Stopped("stopped after 1 steps", code)
    except Stopped:
        assert code is not None
    assert ended == expected


def test_slow_bfloat16_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: False)
    devices._say_slow.cache_clear()
    for name in ("float32", "auto", "bfloat16", "bfloat16"):
        devices.choose_precision(name, CPU)
    assert capsys.readouterr().out.count("on this processor bfloat16 takes several times as long") == 1


def test_who_had_met_the_others_before_goes_on_with_them(tmp_path: Path) -> None:
    """One script of several runs: to meet twice at one port may wait for ever."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with joined.leaving():
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def processes(count: int, *words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "scripts" / "torchrun.py", ROOT / "tests" / "processes.py", *words]
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as place:
        settings = {**os.environ, "NPROC": str(count), "TMPDIR": place}
        found = subprocess.run(words, env=settings, capture_output=True, text=True, timeout=300, check=False)
        left = {path.name for path in Path(place).glob("*torch*")}
        assert not {name for name in left if not name.startswith("torchinductor_")}  # nothing of the launcher stays
    return found


def start(launcher: str, *flags: object, **environment: str) -> "subprocess.Popen[str]":
    settings = {"NPROC": "2", **os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", ROOT / "scripts" / launcher, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(w) for w in command], env=settings, text=True, **pipes)


def run(launcher: str, *flags: object, **environment: str) -> tuple[int, str, str]:
    process = start(launcher, *flags, **environment)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def until_saved(process: "subprocess.Popen[str]", output: Path, times: int) -> None:
    """Wait until the process has written `times` checkpoints to `output`."""
    seen: set[int] = set()
    while len(seen) < times:
        assert process.poll() is None, process.communicate()
        if (output / "last.pt").exists():
            seen.add((output / "last.pt").stat().st_mtime_ns)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def steps(small_npz: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASE/1-0.pt, of one process, and CASE/2-RANK.pt, of two."""
    directory = tmp_path_factory.mktemp("steps")
    for count in (1, 2):
        found = processes(count, "steps", small_npz, photos, directory)
        assert found.returncode == 0, found.stderr
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gradient", "overhaul"])
def test_gradient_and_evaluation_of_two_are_those_of_one(case: str, steps: Path) -> None:
    """EfficientNet-B0 in float64, BatchNorm in eval mode, no dropout, each number to 1e-5: CE, the two in two parts
    each; and with features of a ResNet-18, the connectors too."""
    one = torch.load(steps / case / "1-0.pt", weights_only=True)
    for rank in range(2):
        two = torch.load(steps / case / f"2-{rank}.pt", weights_only=True)
        largest = max(g.abs().max().item() for g in one["gradients"].values())
        assert largest > 1e-3
        visible = [key for key, gradient in one["gradients"].items() if gradient.abs().max() > 1e-4 * largest]
        assert len(visible) > 0.9 * len(one["gradients"])
        connected = [key for key in visible if "connectors" in key]
        assert len(connected) == (12 if case == "overhaul" else 0), connected
        assert one["gradients"].keys() == two["gradients"].keys()
        for key, gradient in two["gradients"].items():
            expected = one["gradients"][key]
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9 * largest, msg=key)
        assert torch.equal(one["predictions"], two["predictions"])
        assert one["found"]["images"] == two["found"]["images"] == 20
        assert one["found"]["accuracy"] == two["found"]["accuracy"]


@pytest.mark.slow
def test_two_learn_from_features_as_one(steps: Path) -> None:
    """A loss that is of each image: that of one process; one that compares images: the mean of the two halves'. The
    memories of crd are alike in both, and those of one process."""
    one = torch.load(steps / "features" / "1-0.pt", weights_only=True)
    for rank in range(2):
        two = torch.load(steps / "features" / f"2-{rank}.pt", weights_only=True)
        assert two.keys() == one.keys() == FEATURES.keys()
        for name, expected in one.items():
            assert expected.keys() == two[name].keys()
            for key, value in two[name].items():
                largest = expected[key].abs().max().item()
                assert largest > 0, (name, key)
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4 * largest, msg=f"{name} {key}")
    assert {"memory.student", "memory.teacher", "memory.scale"} <= one["crd"].keys()


@pytest.mark.slow
def test_photos_are_evaluated_alike_by_two(steps: Path) -> None:
    one = torch.load(steps / "photos" / "1-0.pt", weights_only=True)
    for rank in range(2):
        two = torch.load(steps / "photos" / f"2-{rank}.pt", weights_only=True)
        assert torch.equal(one["predictions"], two["predictions"])
        for name in ("images", "accuracy", "top5"):
            assert one["found"][name] == two["found"][name]
        assert one["found"]["loss"] == pytest.approx(two["found"]["loss"], rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_shares_make_up_the_whole(count: int, small_npz: Path) -> None:
    """Any number of processes: each test image once, in order; each batch divided, in the order of one process."""
    training, tests = prepare(load_data(str(small_npz)), Recipe(batch_size=28), CPU)
    parts = [images for rank in range(count) for images, _ in tests["test"].batches(rank, count)]
    assert torch.equal(torch.cat(parts), tests["test"].images)
    plan = training.plan
    whole = [selection.indices for selection in plan.shuffle(3)[0]]
    if 28 % count == 0:
        shares = [
            EpochPlan(plan.indices, plan.order, plan.seed, 28, rank, count).shuffle(3)[0] for rank in range(count)
        ]
        together = [np.concatenate([selection.indices for selection in step]) for step in zip(*shares, strict=True)]
        assert np.array_equal(together, whole)
        assert len(whole[0]) == 28


def test_a_batch_that_cannot_be_divided_is_refused(small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar10.data.rank_and_world_size", lambda: (0, 3))
    with pytest.raises(UserError, match="--batch-size 8 must be a multiple of the 3 processes"):
        prepare(load_data(str(small_npz)), Recipe(batch_size=8), CPU)


@pytest.mark.slow
def test_nan_in_one_process_stops_all(small_npz: Path, tmp_path: Path) -> None:
    found = processes(2, "nan", small_npz, tmp_path)
    assert found.returncode == 1
    assert found.stderr.count("not finite at step 1") == 1, found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run2" / "last.pt").exists()
    weights = [torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*weights)
    assert torch.isfinite(weights[0]).all()


def test_signals_kills_and_restarts_end_in_the_same_state(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR1 to the launcher, the same command; then SIGKILL of process 1, and torchrun starts all three again. The
    run is refused to one process, and, where torchrun may start it again, to --fresh."""
    # From three on the order of a sum of gradients matters.
    flags = [*FLAGS, "--batch-size", "9", "--data", small_npz, "--output"]
    monkeypatch.setenv("NPROC", "3")
    code, out, errors = run("trainCE.sh", *flags, tmp_path / "whole")
    assert code == 0, errors
    assert out.count("epoch 3/3") == 1
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["world_size"] == 3

    cut = tmp_path / "cut"
    process = start("trainCE.sh", *flags, cut, "--save-minutes", "0")
    until_saved(process, cut, 2)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 138, errors
    assert errors.count("stopped by SIGUSR1") == 1
    assert "Traceback" not in errors

    process = start("trainCE.sh", *flags, cut, "--save-minutes", "0", MAX_RESTARTS="1")
    until_saved(process, cut, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    settings = {p: b"\0" + Path(f"/proc/{p}/environ").read_bytes() for p in children}
    victim = next(p for p in children if b"\0RANK=1\0" in settings[p])
    os.kill(int(victim), signal.SIGKILL)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert out.count("continuing at epoch") == 2
    assert final_state(cut) == final_state(tmp_path / "whole")
    assert checkpoint.load(cut / "last.pt")["ranks"][1]["tally"].shape == (4,)

    alone = [*map(str, flags), str(cut)]
    with pytest.raises(UserError, match=r"\(world_size\) was 3, is 1"):
        train_ce.main(alone)
    assert b"\0TORCHELASTIC_MAX_RESTARTS=1\0" in settings[victim]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(UserError, match="--fresh would start over at each restart"):
        train_ce.main([*alone, "--fresh"])


def test_kd_trains_its_teacher_in_both_processes(small_npz: Path, tmp_path: Path) -> None:
    flags = ["--data", small_npz, "--teacher-arch", "densenet_cifar", *FLAGS, "--epochs", "1"]
    code, out, errors = run("trainKD.sh", *flags, DISTILL_CHECKPOINTS=str(tmp_path))
    assert code == 0, errors
    assert out.count("it is trained first by CE") == 1
    assert out.count("epoch 1/1") == 2
    assert "teacher: 40 views computed, 0 were in the store" in out  # by both of them
    runs = {path.parent.name for path in tmp_path.rglob("summary.json")}
    assert runs == {"ce-seed0", "kd-densenet_cifar-T3-w0.8-seed0"}


def test_a_wrong_flag_or_path_is_told_once(tmp_path: Path) -> None:
    code, _, errors = run("trainCE.sh", "--ep", "3")
    assert (code, errors.count("unknown argument")) == (2, 1)
    code, _, errors = run("trainCE.sh", "--data", tmp_path / "absent", "--device", "cpu")
    assert (code, errors.count("does not exist")) == (2, 1)
    assert "Traceback" not in errors
    assert run("trainCE.sh", "--help")[1].count("usage:") == 1
    code, _, errors = run("trainCE.sh", NNODES="2")
    assert code != 0
    assert "MASTER_ADDR" in errors


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "tpu", "cuda:1,", "meta"])
def test_devices_refuses(name: str) -> None:
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda, cuda:N or cuda:N,M"):
        devices.devices(name)


def test_devices_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.devices("cpu") == [CPU]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"cannot use this machine's GPUs: .* --device cpu"):
        devices.devices("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices.devices("auto") == devices.devices("cuda") == devices.devices("cuda:0,1") == both
    assert devices.devices("cuda:1") == both[1:]
    assert devices.devices("cuda:0,0") == [both[0], both[0]]
    assert (devices.replicas("auto"), devices.replicas("cuda:1"), devices.replicas("cpu")) == (2, 1, 1)
    with pytest.raises(UserError, match="has 2 CUDA devices"):
        devices.devices("cuda:2")


@pytest.mark.parametrize(("accumulate", "mode"), [(1, "reduce-overhead"), (2, None)])
def test_cuda_graphs_only_where_a_step_has_one_part(
    accumulate: int, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: modes.append(mode) or network)
    monkeypatch.setattr(devices, "devices", lambda _name: [torch.device("cuda", 0)])
    recipe = Recipe(compile=True, accumulate=accumulate)
    wrap.wrap_parallel(torch.nn.Linear(1, 1), torch.device("cuda", 0), recipe, "cuda:0")
    assert modes == [mode]
