"""One run, one directory: who holds it, what it is, what it has measured."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from distill import checkpoint
from distill.errors import UserError
from distill.knobs import flag
from distill.parallel import describe_device, on_main, rank
from distill.recipe import Options, Recipe
from distill.registry import Classifier, count_parameters

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = Path(os.environ.get("DISTILL_CHECKPOINTS") or ROOT / "checkpoints")  # e.g. a cluster's scratch disk
CONFIG, METRICS, SUMMARY, LOCK = "config.json", "metrics.jsonl", "summary.json", "lock"
NAMES = ("data", "images")  # facts that are for reading: what images are called and how many, not which


class RunDirectory:
    """A directory with config.json, metrics.jsonl, checkpoints and summary.json, held by one process at a time.

    Use as a context manager. Entering raises UserError, naming the holder, if another process holds it. The lock is
    the kernel's (flock): it ends with its process, however that dies. Of several processes of one run rank 0 holds it,
    reads and writes; the others get what it returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def __enter__(self) -> "RunDirectory":
        self._hold()
        return self

    @on_main
    def _hold(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a+")  # noqa: SIM115 stays open as long as the run is held
        except OSError as error:
            raise UserError(f"cannot use {self.path} as a run's directory: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n")
            lock.flush()
        except BlockingIOError:
            time.sleep(0.1)  # the holder may have taken the lock a moment ago and not have written yet
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(f"{self.path} is in use by {holder}; wait for it, or choose another --output") from None
        except OSError as error:
            lock.close()
            raise UserError(f"cannot lock {self.path / LOCK}: {error.strerror}; choose an --output elsewhere") from None
        self._lock = lock
        for leftover in self.path.glob(f"*{checkpoint.TEMPORARY}"):  # of a process killed inside a save
            leftover.unlink(missing_ok=True)

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    @on_main
    def check(
        self, recipe: Recipe, facts: dict[str, Any], *, extend: bool = False, allow_data_change: bool = False
    ) -> None:
        """Raises UserError, naming the fields that differ, if the directory holds another run than that of `recipe`
        and `facts` (digests of data, teacher, ...), as far as they are given. `extend` lets `epochs` grow,
        `allow_data_change` lets the images be others."""
        self._check(recipe, facts, extend, allow_data_change)

    def _check(self, recipe: Recipe, facts: dict[str, Any], extend: bool, allow_data_change: bool) -> None:
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
        if allow_data_change and "data_digest" in changed:
            changed.remove("data_digest")
        if changed:
            hint = "--extend continues with more epochs, " if changed == ["epochs"] and grows else ""
            if "data_digest" in changed:
                hint += f"--allow-data-change goes on with {_counts(before, now)}, "
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
        self,
        recipe: Recipe,
        facts: dict[str, Any],
        device: torch.device,
        *,
        extend: bool = False,
        allow_data_change: bool = False,
    ) -> dict[str, Any] | None:
        """`check`, and `report` of a finished run; otherwise record in config.json that this process starts or
        continues the run, with a line where the images, torch or the device are not those of the last time."""
        self._check(recipe, facts, extend, allow_data_change)
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
        if config and starts and not self._data_change(start, config["facts"], facts):
            updated["broken"] = config.get("broken", {})
        checkpoint.write_atomically(self.path / CONFIG, _json(updated))
        return None

    @staticmethod
    def _data_change(start: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> bool:
        """Whether the images are others than before: then it is recorded in `start`, and said."""
        if before["data_digest"] == now["data_digest"]:
            return False
        start["data_change"] = {key: [before.get(key), now.get(key)] for key in ("data_digest", "images")}
        print(f"--allow-data-change: the run goes on with {_counts(before, now)}")
        return True

    @on_main
    def broken(self) -> dict[str, int]:
        """The image files that this run has found broken, and their sizes then."""
        config = self.read_config()
        return dict(config.get("broken", {})) if config and self.has_begun() else {}

    @on_main
    def record_broken(self, files: Iterable[str]) -> None:
        """Keep with the run which image files were found broken, so that it goes on when they have been mended."""
        config = self.read_config()
        if config:
            sizes = {os.path.abspath(file): os.stat(file).st_size for file in files if os.path.exists(file)}
            config["broken"] = {**sizes, **config.get("broken", {})}
            checkpoint.write_atomically(self.path / CONFIG, _json(config))

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
        config = self.read_config()
        changes = [start["data_change"] for start in (config or {"starts": []})["starts"] if "data_change" in start]
        summary |= {"data_changes": changes} if changes else {}
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
    return [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in NAMES]


def _counts(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`23 training, 8 test images (24 training, 8 test images before)`, of what facts say of the images."""
    same = before.get("images") == now.get("images")
    return f"{now.get('images')} ({'as many, but others,' if same else before.get('images')} before)"


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
