"""One run, one directory: who holds it, what it is, what it has measured."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint
from distill.errors import UserError
from distill.hold import Hold
from distill.knobs import flag
from distill.parallel import describe_device, on_main, rank
from distill.recipe import Options, Recipe
from distill.registry import Classifier, count_parameters

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = Path(os.environ.get("DISTILL_CHECKPOINTS") or ROOT / "checkpoints")  # e.g. a cluster's scratch disk
CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"


class RunDirectory:
    """A directory with config.json, metrics.jsonl, checkpoints and summary.json, held by one process at a time.

    Use as a context manager. Entering raises UserError, naming the holder, if another process holds it (hold.py). Of
    several processes of one run rank 0 holds it, reads and writes; the others get what it returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Hold | None = None

    def __enter__(self) -> "RunDirectory":
        self._hold()
        return self

    @on_main
    def _hold(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Hold(self.path)
        except OSError as error:
            hint = "--output DIR, or DISTILL_CHECKPOINTS=DIR for all runs, is one elsewhere"
            raise UserError(f"cannot use {self.path} as a run's directory: {error.strerror}; {hint}") from None
        for leftover in self.path.glob(f"*{checkpoint.TEMPORARY}"):  # of a process killed inside a save
            leftover.unlink(missing_ok=True)

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.release()
            self._lock = None

    @on_main
    def check(self, recipe: Recipe, facts: dict[str, Any], *, extend: bool = False) -> None:
        """Raises UserError, naming the fields that differ, if the directory holds another run than that of `recipe`
        and `facts` (digests of data, teacher, ...), as far as they are given. `extend` lets `epochs` grow."""
        self._check(recipe, facts, extend)

    def _check(self, recipe: Recipe, facts: dict[str, Any], extend: bool) -> None:
        config = self.read_config()
        if not config or not self.has_begun():
            return
        before = type(recipe).from_dict(config["recipe"]).to_dict()
        before |= {key: value for key, value in config["facts"].items() if key in facts}
        now = {**recipe.to_dict(), **facts}
        changed = differing(before, now)
        grows = "epochs" in changed and recipe.epochs > before["epochs"]
        if extend and grows:
            changed.remove("epochs")
        if changed:
            hint = "--extend continues with more epochs, " if changed == ["epochs"] and grows else ""
            hint += "--fresh or another --output starts a new one"
            raise UserError(f"{self.path} holds another run: {tell(changed, before, now)}; {hint}")

    @on_main
    def recorded(self, name: str) -> Any:
        """What the run that has begun in this directory recorded as the fact `name`, or None."""
        config = self.read_config()
        return config["facts"].get(name) if config and self.has_begun() else None

    def has_begun(self) -> bool:
        """Whether anything was saved: a run that was refused or failed before that leaves its directory to another."""
        names = (checkpoint.LAST, checkpoint.PREVIOUS, f"{checkpoint.LAST}.damaged", SUMMARY)
        return any(os.path.lexists(self.path / name) for name in names)

    @on_main
    def report(self, recipe: Recipe) -> dict[str, Any] | None:
        """The summary, after printing it, if the run is finished."""
        return self._report(recipe)

    def _report(self, recipe: Recipe) -> dict[str, Any] | None:
        summary = self.finished(recipe)
        if summary:
            print(f"finished before: {self.path}\n{describe(summary)}")
        return summary

    @on_main
    def claim(
        self, recipe: Recipe, facts: dict[str, Any], device: torch.device, *, extend: bool = False
    ) -> dict[str, Any] | None:
        """`check`, and `report` of a finished run; otherwise record in config.json that this process starts or
        continues the run, with a line where torch or the device are not those of the last time."""
        self._check(recipe, facts, extend)
        if summary := self._report(recipe):
            return summary
        config = self.read_config()
        starts = config["starts"] if config and self.has_begun() else []
        start: dict[str, Any] = {"time": _now(), "argv": sys.argv, "commit": commit()}
        start |= {"versions": versions(), "machine": machine(device)}
        for what, value in (("versions", start["versions"]), ("device", start["machine"]["device"])):
            former = {**starts[-1], **starts[-1]["machine"]}[what] if starts else value
            if former != value:
                print(f"note: {what} {former} before, {value} now: the result may differ in the last bits")
        updated = {"recipe": recipe.to_dict(), "facts": facts, "starts": [*starts, start]}
        checkpoint.write_atomically(self.path / CONFIG, _json(updated))
        return None

    def read_config(self) -> dict[str, Any] | None:
        """config.json, or None in a new directory. Raises UserError if it cannot be read."""
        return _read_json(self.path / CONFIG, {"recipe": dict, "facts": dict, "starts": list})

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """summary.json, or None while the run is not at the end of `recipe` (it may have been extended since)."""
        summary = _read_json(self.path / SUMMARY, {"epochs": int})
        return summary if summary and summary["epochs"] == recipe.epochs else None

    @on_main
    def finish(self, recipe: Recipe, facts: dict[str, Any], student: Classifier, **results: Any) -> dict[str, Any]:
        """Write and print summary.json: what the run is, `results` (percent, nats, seconds), and what computed it."""
        taught = recipe.objective == "kd"
        summary: dict[str, Any] = {
            "arch": recipe.arch,
            "teacher_arch": recipe.teacher_arch,
            "objective": recipe.objective,
            "trained_by": recipe.trained_by,
            "method": recipe.method if taught else None,
            "T": recipe.T if taught else None,
            "w": recipe.w if taught else None,
            "formula": recipe.formula if taught else None,
            "seed": recipe.seed,
            "view_seed": recipe.view_seed,
            "data": {"name": facts["data"], "digest": facts["data_digest"]},
            "augment": recipe.augment,
            "epochs": recipe.epochs,
            "world_size": facts["world_size"],
            "teacher_accuracy": None,
            "agreement": None,
            **results,
            "parameters": count_parameters(student.network),
            "precision": str(student.precision).removeprefix("torch."),
            "device": describe_device(student.mean.device),
            "torch": str(torch.__version__),
            "commit": commit(),
        }
        checkpoint.write_atomically(self.path / SUMMARY, _json(summary))
        print(describe(summary))
        return summary

    @on_main
    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Make metrics.jsonl hold `records`, one line an epoch. They stand in the checkpoint too, which decides."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        checkpoint.write_atomically(self.path / METRICS, lines.encode())

    def open_board(self) -> Any:
        """TensorBoard's SummaryWriter for tensorboard/ in this directory, in the process that writes files, else None.
        Raises UserError if the package is absent."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        return SummaryWriter(str(self.path / "tensorboard")) if rank() == 0 else None


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields in which two runs (recipe and facts together) differ."""
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def tell(changed: list[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    """`--lr was 0.1, is 0.2, data_digest was 1, is 2`: flags of the recipe, and facts."""
    known = {name for owner in (Recipe, *Recipe.__subclasses__()) for name in vars(owner)["__dataclass_fields__"]}
    shown = [{key: str(values.get(key))[:24] for key in changed} for values in (before, now)]  # of a digest enough
    return ", ".join(f"{flag(k) if k in known else k} was {shown[0][k]}, is {shown[1][k]}" for k in changed)


def open_run(options: Options, recipe: Recipe, data_name: str) -> RunDirectory:
    """The directory of a run: --output, or checkpoints/DATA/ARCH/RUN; with --fresh the next name that is free."""
    path = Path(options.output) if options.output else CHECKPOINTS / data_name / recipe.arch / recipe.run_name
    if options.fresh and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError("--fresh would start over at each restart: name a new --output in place of it")
    if options.fresh and on_main(path.exists)():
        path = on_main(next_free)(path)
        print(f"starting over in {path}; to continue it, --output {path} in place of --fresh")
    return RunDirectory(path)


def describe(summary: dict[str, Any]) -> str:
    """A run's result in a line."""
    epochs = f"{summary['epochs']} epoch{'s' if summary['epochs'] > 1 else ''}"
    line = f"{summary['arch']}: test accuracy {summary['test_accuracy']:.2f} % after {epochs}"
    if best := summary.get("best_epoch"):
        line += f" (best.pt, by {best['val_accuracy']:.2f} % on the validation part in epoch {best['epoch']}: "
        line += f"{best['test_accuracy']:.2f} %)"
    if summary["teacher_arch"]:
        line += f", teacher {summary['teacher_arch']} {summary['teacher_accuracy']:.2f} %"
        line += f", they agree on {summary['agreement']:.2f} %"
    return f"{line}, {summary['train_images_per_second']:.0f} images/s"


def next_free(path: Path) -> Path:
    """`path`, or with the first of -2, -3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def commit() -> str | None:
    """The commit of this repository, with `-dirty` where tracked files differ from it; None outside of git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}


def machine(device: torch.device) -> dict[str, Any]:
    return {"host": socket.gethostname(), "system": platform.platform(), "device": describe_device(device)}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _read_json(path: Path, required: dict[str, type]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; put it back or choose another --output") from None
    if not isinstance(content, dict) or any(type(content.get(key)) is not kind for key, kind in required.items()):
        raise UserError(f"{path} is not what this program wrote; put it back or choose another --output")
    return content
