"""The loop: continuing bit by bit, signals, NaN, validation; devices and generators of a run."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from cifar10.data import load_data, prepare
from cifar10.models import CIFAR_INPUT, MODELS
from distill.config.recipe import Options
from distill.data.datasets import Batch
from distill.errors import CannotReadError, CheckpointError, UserError
from distill.files import checkpoint
from distill.models import probe as trial
from distill.models.classifier import Classifier
from distill.parallel import devices
from distill.run.outcome import diverged
from distill.run.run import Run
from distill.run.tensorboard import TensorBoardWriter
from distill.training import engine
from distill.training.evaluation import evaluate
from distill.training.objectives import CrossEntropy, Step
from distill.training.stop import SIGNALS, Stopped, StopRequest
from distill.training.wrap import wrap_parallel
from tests.runs import CPU, RECIPE, small_network, state, taught, teaching, train

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------- continuing, bit for bit
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "crop_flip"},
        {"augment": "original"},
        {"mixup": True, "cutout": 9, "augment": "original"},
        {"optimizer": "rmsprop", "lr": 0.001, "accumulate": 2, "schedule": "step", "decay_epochs": 0.5},
        {"optimizer": "adamw", "lr": 0.001, "ema": 0.9, "clip_norm": 1.0, "schedule": "onecycle"},
        {"sizes": "16:1,24:1", "bias_lr": 8.0, "bn_momentum": 0.3, "alternate_flip": True, "reflect": True},
    ],
    ids=str,
)
def test_cut_anywhere_and_continued(small_npz: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stopped after every single step, in a new process's state each time: the same weights, optimiser and metrics."""
    recipe = replace(RECIPE, **changes)
    train(tmp_path / "whole", small_npz, recipe, teacher=teaching())
    for stop in range(3 * 5 - 1):
        torch.manual_seed(stop)  # what the generators hold before must play no part
        student = small_network(seed=stop and 7)  # nor what the network starts with, once there is a checkpoint
        with pytest.raises(Stopped, match="after 1 steps") as stopped:
            train(tmp_path / "cut", small_npz, recipe, Options(steps=1), None, student, teaching())
        assert stopped.value.exit_code == 0
    train(tmp_path / "cut", small_npz, recipe, Options(steps=1), None, small_network(seed=7), teaching())
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile takes a C++ compiler")
def test_compiled_learns_the_same_and_continues(small_npz: Path, tmp_path: Path) -> None:
    """Dropout, BatchNorm and mode changes in between, compiled: cut and continued bit for bit, near the eager loss."""
    recipe = replace(RECIPE, compile=True, epochs=2)
    whole = train(tmp_path / "whole", small_npz, recipe)
    for steps in (1, 5):
        with pytest.raises(Stopped):
            train(tmp_path / "cut", small_npz, recipe, Options(steps=steps))
    train(tmp_path / "cut", small_npz, recipe)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    eager = train(tmp_path / "eager", small_npz, replace(recipe, compile=False))
    # dropout draws other numbers when compiled
    assert whole.records[-1]["train_loss"] == pytest.approx(eager.records[-1]["train_loss"], rel=0.1)


def test_without_a_compiler(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        train(tmp_path, small_npz, replace(RECIPE, compile=True))


def test_sync_bn_is_refused_where_it_cannot_be(small_npz: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sync-bn takes CUDA"):
        train(tmp_path, small_npz, replace(RECIPE, sync_bn=True))


def test_sync_bn_keeps_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that says it is CUDA: converted layers, the same parameters under the same names."""
    network = small_network()
    before = dict(network.network.named_parameters())
    monkeypatch.setitem(network._buffers, "mean", SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert wrap_parallel(network, network.mean.device, replace(RECIPE, sync_bn=True), "cuda:0") is network
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    after = dict(network.network.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_several_gpus_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel over the devices named; compiling and common BatchNorm statistics take a process for each."""
    found = []
    network = small_network()
    monkeypatch.setitem(network._buffers, "mean", SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "DataParallel", lambda module, here: found.append((module, here)) or module)
    wrap_parallel(network, network.mean.device, RECIPE, "auto")
    wrap_parallel(network, network.mean.device, RECIPE, "cuda:0,0")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert found == [(network, [first, second]), (network, [first, first])]
    for change, message in (({"compile": True}, "--compile takes one GPU"), ({"sync_bn": True}, "--sync-bn takes")):
        with pytest.raises(UserError, match=message):
            wrap_parallel(network, network.mean.device, replace(RECIPE, **change), "auto")


def test_tensorboard(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted = train(tmp_path / "run", small_npz, options=Options(tensorboard=True))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("test_accuracy")}
    assert shown == {r["epoch"]: pytest.approx(r["test_accuracy"]) for r in fitted.records}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard: pip install tensorboard"):
        train(tmp_path / "other", small_npz, options=Options(tensorboard=True))


def on_board(run: Path) -> list[tuple[int, float]]:
    """(epoch, test accuracy) of each value on the board."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, round(event.value, 3)) for event in board.Scalars("test_accuracy")]


def test_tensorboard_gets_what_it_lacks(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs from before it was asked for, one whose end was killed after its checkpoint, those of a finished run."""
    run, wanted = tmp_path / "run", Options(tensorboard=True)
    with pytest.raises(Stopped):
        train(run, small_npz, options=Options(steps=7))
    show = TensorBoardWriter.show
    interrupted = lambda self, records: _interrupt() if len(records) > 1 else show(self, records)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardWriter, "show", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run, small_npz, options=wanted)
    assert [epoch for epoch, _ in on_board(run)] == [1]
    (events,) = (run / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-3])  # the kill cut a value, too
    fitted = train(run, small_npz, options=wanted)
    expected = [(r["epoch"], round(r["test_accuracy"], 3)) for r in fitted.records]
    assert sorted(on_board(run)) == expected
    files = sorted((run / "tensorboard").iterdir())
    train(run, small_npz, options=wanted)
    assert len(on_board(run)) == 3
    assert sorted((run / "tensorboard").iterdir()) == files
    shutil.rmtree(run / "tensorboard")
    facts = {"data": "x", "data_digest": "", "world_size": 1}
    with Run(run, RECIPE, wanted, facts) as directory:
        directory.finish(small_network(), **fitted.to_dict())
        directory.report()
    assert on_board(run) == expected


def _interrupt() -> None:
    raise KeyboardInterrupt


class Exploding(CrossEntropy):
    """A loss that is as usual for some steps, and then a hundred thousand times that."""

    after, steps = 0, 0

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        type(self).steps += 1
        step = super().__call__(student, batch)
        factor = 1e5 if type(self).steps > self.after else 1.0
        return step._replace(loss=step.loss + (factor - 1) * step.loss.detach())


@pytest.mark.parametrize(("after", "epoch"), [(1, 1), (7, 2), (100, None)])
def test_a_loss_that_goes_astray_is_told(
    after: int,
    epoch: int | None,
    small_npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a warning, once, and in the summary; in the first epoch too, and in a run that was cut."""
    monkeypatch.setattr(Exploding, "after", after)
    monkeypatch.setattr(Exploding, "steps", 0)
    with pytest.raises(Stopped):
        train(tmp_path, small_npz, options=Options(steps=3), loss=Exploding())
    fitted = train(tmp_path, small_npz, loss=Exploding())
    with Run(tmp_path, RECIPE, Options(), {"data": "x", "data_digest": "", "world_size": 1}) as run:
        summary = run.finish(small_network(), **fitted.to_dict())
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the loss of epoch")]
    assert [line.split()[5] for line in warnings] == ([str(epoch)] if epoch else [])
    assert (summary["diverged"] or {}).get("epoch") == epoch
    if summary["diverged"]:
        assert summary["diverged"]["train_loss"] > 1e4
        assert 0.5 < summary["diverged"]["first_loss"] < 5


def test_a_run_of_before_has_no_first_loss_to_compare_with() -> None:
    records = [{"epoch": k + 1, "train_loss": loss} for k, loss in enumerate((2.0, 1.0, 3000.0))]
    assert diverged(records, None) == {"epoch": 3, "train_loss": 3000.0, "first_loss": 2.0}
    assert diverged(records, 4.0) == {"epoch": 3, "train_loss": 3000.0, "first_loss": 2.0}
    assert diverged([{"epoch": 1, "train_loss": 0.5}], 1e-8) is None  # a student that starts as its teacher
    assert diverged([], None) is None


def test_time_between_checkpoints_does_not_matter(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "seldom", small_npz)
    train(tmp_path / "often", small_npz, options=Options(save_minutes=0))
    assert state(tmp_path / "seldom") == state(tmp_path / "often")


def test_each_epoch_tells_how_long_the_run_will_take(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", small_npz)
    first, second, last = re.findall(r"epoch \d/3 .*", capsys.readouterr().out)
    assert re.search(r" s, \d+ s left$", first)
    assert re.search(r" s, \d+ s left$", second)
    assert re.search(r" images/s  [\d.]+ s$", last)


def test_seconds_left() -> None:
    """Of four epochs the first two have half the pixels a side; the second is at its end, or half through the third."""
    recipe = replace(RECIPE, epochs=4, sizes="16:2")
    student, data = SimpleNamespace(spec=CIFAR_INPUT), SimpleNamespace(steps_per_epoch=100)

    def left(epoch: int, step: int) -> float:
        state = SimpleNamespace(epoch=epoch, step=step)
        model = SimpleNamespace(student=student)
        trainer = SimpleNamespace(recipe=recipe, data=data, state=state, model=model, evaluation_seconds=7.0)
        return engine.Trainer.seconds_left(trainer, 0.1)  # type: ignore[arg-type]

    assert left(2, 0) == pytest.approx(2 * 40 + 14)  # 0.1 s a step of the small images
    assert left(2, 50) == pytest.approx(5 + 10 + 14)
    assert left(0, 50) == pytest.approx(5 + 10 + 80 + 28)


def test_seeds(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "a", small_npz)
    for name, recipe in (("seed", replace(RECIPE, seed=1)), ("views", replace(RECIPE, view_seed=1))):
        train(tmp_path / name, small_npz, recipe)
        same = checkpoint.load(tmp_path / "a" / "last.pt")["student"]
        assert checkpoint.digest(same) != checkpoint.digest(checkpoint.load(tmp_path / name / "last.pt")["student"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_saves_at_the_next_step(small_npz: Path, tmp_path: Path, number: signal.Signals) -> None:
    train(tmp_path / "whole", small_npz)

    class Signalling(CrossEntropy):
        steps = 0

        def __call__(self, student: nn.Module, batch: Batch) -> Step:
            type(self).steps += 1
            if self.steps == 7:
                os.kill(os.getpid(), number)
            return super().__call__(student, batch)

    handlers = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(Stopped, match=f"stopped by {number.name} at epoch 2, step 2 of 5") as stop:
        train(tmp_path / "cut", small_npz, loss=Signalling())
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    train(tmp_path / "cut", small_npz)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


@pytest.mark.parametrize("numbers", [("SIGINT", "SIGINT"), ("SIGUSR1", "SIGINT"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_ends_at_once(numbers: tuple[str, str]) -> None:
    """With and without time between the two; without, two of a kind may arrive as one, as signals do."""
    first, second = (signal.Signals[name] for name in numbers)
    for pause in (0.1, 0) if second == signal.SIGINT else (2.1,):
        code = f"""if True:
            import os, time
            from distill.training.stop import StopRequest
            with StopRequest() as stop:
                os.kill(os.getpid(), {int(first)}); time.sleep({pause}); os.kill(os.getpid(), {int(second)})
                time.sleep(5)
            """
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert found.returncode in (128 + first, 128 + second)
        assert found.stderr == ""


def test_signal_during_evaluation(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", small_npz)
    monkeypatch.setattr(engine, "evaluate", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*a))[1])
    with pytest.raises(Stopped, match="at epoch 1, step 5 of 5"):
        train(tmp_path / "cut", small_npz)
    monkeypatch.undo()
    train(tmp_path / "cut", small_npz)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


def test_damaged_last_checkpoint_falls_back(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "whole", small_npz)
    with pytest.raises(Stopped):
        train(tmp_path / "cut", small_npz, options=Options(steps=12))
    (tmp_path / "cut" / "last.pt").write_bytes(b"PK damaged")
    train(tmp_path / "cut", small_npz)
    assert "continuing from previous.pt" in capsys.readouterr().err
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


def test_resume_starts_a_run_from_a_named_checkpoint(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", small_npz)
    with pytest.raises(Stopped):
        train(tmp_path / "part", small_npz, options=Options(steps=7))
    named = str(tmp_path / "part" / "last.pt")
    with pytest.raises(Stopped, match="at epoch 3, step 0"):
        train(tmp_path / "again", small_npz, options=Options(resume=named, steps=3))
    # The same command continues from the run's own checkpoint, or a preempted job would never end.
    with pytest.raises(Stopped, match="at epoch 3, step 3"):
        train(tmp_path / "again", small_npz, options=Options(resume=named, steps=3))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_latest", Mock(side_effect=CannotReadError("a passing error")))
        with pytest.raises(UserError, match="a passing error"):  # the named one would throw it back
            train(tmp_path / "again", small_npz, options=Options(resume=named))
    train(tmp_path / "again", small_npz, options=Options(resume=named))
    assert state(tmp_path / "again") == state(tmp_path / "whole")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "again" / name).write_bytes(b"damaged")
    train(tmp_path / "again", small_npz, options=Options(resume=named))
    assert state(tmp_path / "again") == state(tmp_path / "whole")
    with pytest.raises(UserError, match=r"is of another run: --lr was 0\.05, is 0\.1"):
        train(tmp_path / "other", small_npz, replace(RECIPE, lr=0.1), Options(resume=named))
    with pytest.raises(UserError, match="No such file"):
        train(tmp_path / "whole", small_npz, options=Options(resume=str(tmp_path / "nothing.pt")))


ABSURD: list[dict[str, Any]] = [
    {"epoch": -1},
    {"epoch": 99},
    {"epoch": "two"},
    {"step": -3},
    {"step": 10**9},
    {"records": []},
    {"optimizer": {}},
    {"ranks": [{"generators": {}, "tally": torch.zeros(4)}]},
    {"ranks": []},
    {"student": {"x": torch.zeros(1)}},
    {"ranks": [{"generators": {"cpu": torch.zeros(3)}, "tally": torch.zeros(4)}]},
    {"recipe": [1]},
    {"facts": 3},
]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_state(small_npz: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    train(tmp_path / "run", small_npz)
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "absurd.pt", payload | change)
    with pytest.raises(CheckpointError, match=r"absurd\.pt"):
        train(tmp_path / "other", small_npz, options=Options(resume=str(tmp_path / "absurd.pt")))


def test_gpus_of_one_process_are_not_those_of_several(small_npz: Path, tmp_path: Path) -> None:
    """A run on as many GPUs otherwise has the same identity, and a checkpoint has the state of each process."""
    train(tmp_path / "run", small_npz)
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "run" / "last.pt", payload | {"ranks": 4 * payload["ranks"]})
    with pytest.raises(CheckpointError, match="a run in 4 processes, this is one in 1: NPROC=4 continues"):
        train(tmp_path / "run", small_npz, replace(RECIPE, epochs=4), Options(extend=True))


def test_a_checkpoint_of_the_former_format(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", small_npz)
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "run" / "last.pt", payload | {"format": 1})
    with pytest.raises(CheckpointError, match="of format 1, not 2: commit 1791190 is the last that reads it"):
        train(tmp_path / "run", small_npz)


def test_extend(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", small_npz)
    fitted = train(tmp_path / "run", small_npz, replace(RECIPE, epochs=4), Options(extend=True))
    assert [r["epoch"] for r in fitted.records] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------------ NaN
class Poisoned(CrossEntropy):
    """The loss of step `at` is not finite."""

    at, steps = 7, 0

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        step = super().__call__(student, batch)
        Poisoned.steps += 1
        return Step(step.logits, step.loss * (float("nan") if self.steps == self.at else 1), ())


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_no_update_is_made_from_a_loss_that_is_not_finite(optimizer: str, small_npz: Path, tmp_path: Path) -> None:
    Poisoned.steps = 0
    student = small_network()
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.001)
    with pytest.raises(
        Stopped, match=r"the loss or its gradient is not finite at step 6 \(lr 0\.0.*last good checkpoint is"
    ) as stop:
        train(tmp_path / "run", small_npz, recipe, loss=Poisoned(), student=student)
    assert stop.value.exit_code == 1
    assert all(torch.isfinite(p).all() for p in student.parameters())
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (payload["epoch"], payload["step"]) == (1, 0)
    assert all(torch.isfinite(v).all() for v in payload["student"].values())


def test_the_flag_on_the_device_blocks_updates_without_being_read(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where the flag is read every 50 steps: nothing moves between the bad step and the look."""
    Poisoned.steps = 0
    student, moved = small_network(), []
    monkeypatch.setattr(engine.Trainer, "_check_finite", lambda _: None)
    step = engine.Trainer.train_step

    def watched(self: engine.Trainer, batch: Batch) -> None:
        before = [p.detach().clone() for p in student.parameters()]
        step(self, batch)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)))

    monkeypatch.setattr(engine.Trainer, "train_step", watched)
    train(tmp_path / "run", small_npz, loss=Poisoned(), student=student)
    assert moved == [True] * 6 + [False] * 9


def test_weights_that_are_not_finite_are_not_saved(small_npz: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="not finite at step"):
        train(tmp_path / "run", small_npz, replace(RECIPE, lr=1e30, warmup=0))
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(torch.isfinite(v).all() for v in checkpoint.load(path)["student"].values())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory(small_npz: Path, tmp_path: Path, error: Exception) -> None:
    class Hungry(Poisoned):
        def __call__(self, student: nn.Module, batch: Batch) -> Step:
            if Poisoned.steps == 6:
                raise error
            return super().__call__(student, batch)

    Poisoned.steps = 0
    with pytest.raises(Stopped, match="out of memory with --batch-size 8; try 4") as stop:
        train(tmp_path / "run", small_npz, loss=Hungry())
    assert stop.value.exit_code == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_running_statistics_that_are_not_finite_are_not_saved(small_npz: Path, tmp_path: Path) -> None:
    student = small_network()
    student.network[1].running_var.fill_(math.inf)  # type: ignore[index, operator, union-attr]
    with pytest.raises(Stopped, match="a weight is not finite"):
        train(tmp_path / "run", small_npz, replace(RECIPE, val_split=8), student=student)
    assert not list((tmp_path / "run").glob("*.pt"))


# ----------------------------------------------------------------------------------------------------------- validation
def test_validation_part_chooses_the_best_epoch(small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=6, val_split=8)
    fitted = train(tmp_path / "run", small_npz, recipe)
    accuracies = [r["val_accuracy"] for r in fitted.records]
    best = fitted.to_dict()["best_epoch"]
    assert best["val_accuracy"] == max(accuracies)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    kept = checkpoint.load(tmp_path / "run" / "best.pt")
    assert kept["epoch"] == best["epoch"]
    train(tmp_path / "without", small_npz)
    assert not (tmp_path / "without" / "best.pt").exists()


def test_a_best_epoch_whose_weights_are_not_there(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume into another directory takes best.pt along; one that is gone is not named."""
    recipe = replace(RECIPE, epochs=6, val_split=8)
    best = train(tmp_path / "run", small_npz, recipe).to_dict()["best_epoch"]["epoch"]
    facts = {"data": "x", "data_digest": "", "world_size": 1}

    def told(path: Path) -> tuple[str | None, str]:
        source = str(tmp_path / "run" / "last.pt")
        results = train(path, small_npz, recipe, Options(resume=source)).to_dict()
        with Run(path, recipe, Options(), facts) as run:
            summary = run.finish(small_network(), **results)
            run.report()
            assert run.summary == summary
        return summary["best_epoch"]["weights"], capsys.readouterr().out

    weights, out = told(tmp_path / "other")
    assert checkpoint.load(tmp_path / "other" / "best.pt")["epoch"] == best
    assert weights == "best.pt"
    assert out.count("(best.pt, by ") == 2
    (tmp_path / "run" / "best.pt").unlink()
    weights, out = told(tmp_path / "third")
    assert weights is None
    assert "(best.pt" not in out
    assert out.count("(the best epoch, whose weights are not here, by ") == 2
    (tmp_path / "other" / "best.pt").write_bytes(b"damaged")
    assert told(tmp_path / "other")[0] is None


def test_held_out_images_are_not_trained_on(small_npz: Path) -> None:
    data = load_data(str(small_npz))
    views, tests = prepare(data, replace(RECIPE, val_split=8), CPU)
    trained = {i for epoch in range(5) for batch in views.batches(epoch) for i in batch.indices.tolist()}
    held_out = {i for i in range(40) if any(torch.equal(data.train_images[i], x) for x in tests["val"].images)}
    assert len(tests["val"].labels) == 8
    assert not trained & held_out


@pytest.mark.slow
def test_nothing_grows(small_npz: Path, tmp_path: Path) -> None:
    """2,000 steps and 50 saves: open files and memory stay as they are."""
    resource: Any = pytest.importorskip("resource")
    train(tmp_path / "warm", small_npz)
    files = len(os.listdir("/proc/self/fd"))
    recipe, growth = replace(RECIPE, epochs=25, batch_size=2), []
    for k in range(4):
        train(tmp_path / str(k), small_npz, recipe)
        growth.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(os.listdir("/proc/self/fd")) == files
    assert growth[-1] - growth[0] < 20_000  # KiB, over 1,500 further steps


def test_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPE.lr = 1.0  # type: ignore[misc]


def test_tensors_stay_where_the_student_is() -> None:
    """No host copy in a step: what the objective gets lies on the device of the images."""
    images, logits = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, 4)
    batch = Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4), None, logits)
    seen: list[Tensor] = []
    student = small_network()
    student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    taught(1.0, 0.5)(student, batch)
    assert seen[0] is images


# --------------------------------------------------------------------------------------------- devices and generators
def test_ranks_draw_their_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for number in range(3):
        monkeypatch.setattr("distill.parallel.devices.rank", lambda number=number: number)
        devices.seed_generators(3, "cpu")
        drawn.append(torch.rand(3))
    torch.manual_seed(3)
    assert torch.equal(drawn[0], torch.rand(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_generators_of_several_gpus_are_seeded_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU of one process draws numbers of its own; all of them are saved."""
    states: dict[int, int] = {}
    current = [0]

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        current[0] = device.index
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: states.update({current[0]: seed}))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor(states[device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device.index: int(state)}))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: states.update({0: seed}))
    devices.seed_generators(3, "cuda:0,2")
    assert states.keys() == {0, 2}
    assert states[0] == 3 != states[2]
    saved, before = devices.generator_states("cuda:0,2"), dict(states)
    assert saved.keys() == {"cpu", "cuda", "cuda1"}
    states.update({0: 7, 2: 8})
    devices.restore_generators(saved, "cuda:0,2")
    assert states == before


def test_parameters_that_no_image_reaches() -> None:
    """DistributedDataParallel is not to wait for them; the network is as it was."""
    network = Classifier(MODELS.build("efficientnet_b0", 10), CIFAR_INPUT)
    before, drawn = checkpoint.digest(network.state_dict()), torch.get_rng_state()
    idle = trial.unreached(network)
    assert checkpoint.digest(network.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).sum().backward()
    assert idle
    assert {id(p) for p in idle} == {id(p) for p in network.parameters() if p.grad is None}
    assert trial.unreached(Classifier(MODELS.build("resnet18", 10), CIFAR_INPUT)) == []


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "torchrun"])
def test_a_second_signal_soon_after_is_the_same_request(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.asked()
        assert ended == []
        stop._since -= 31 if launched else 2
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]
