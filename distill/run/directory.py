"""One run, one directory: who holds it, what it is, what it has measured."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import CheckpointError, UserError
from distill.files import checkpoint
from distill.files.lock import DirectoryLock
from distill.parallel.processes import on_main, rank
from distill.run import provenance
from distill.run.outcome import BEST
from distill.run.tensorboard import TensorBoardWriter

ROOT = provenance.ROOT
CHECKPOINTS = Path(os.environ.get("DISTILL_CHECKPOINTS") or ROOT / "checkpoints")  # e.g. a cluster's scratch disk
CONFIG, METRICS, SUMMARY, DIVERGED = "config.json", "metrics.jsonl", "summary.json", "diverged.json"


Held = TypeVar("Held", bound="RunDirectory")


class RunDirectory:
    """A directory with config.json, metrics.jsonl, checkpoints and summary.json, held by one process at a time.

    Use as a context manager. Entering raises UserError, naming the holder, if another process holds it (files/lock.py).
    Of several processes of one run rank 0 holds it, reads and writes; the others get what it returns.
    """

    def __init__(self, path: Path) -> None:
        """Names a directory; entering the context takes hold of it."""
        self.path = path
        self._lock: DirectoryLock | None = None

    def __enter__(self: Held) -> Held:
        """Takes hold of it."""
        self._hold()
        return self

    @on_main
    def _hold(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(self.path)
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
    def recorded(self, name: str) -> Any:
        """What the run that has begun in this directory recorded as the fact `name`, or None."""
        config = self.read_config()
        return config["facts"].get(name) if config and self.has_begun() else None

    @on_main
    def first_images(self) -> str | None:
        """The digest of the images that the run began with, before --allow-data-change; None if it has not begun."""
        config = self.read_config()
        if not config or not self.has_begun():
            return None
        changed = (start["data_change"]["data_digest"][0] for start in config["starts"] if "data_change" in start)
        return next(changed, config["facts"].get("data_digest"))

    def has_begun(self) -> bool:
        """Whether anything was saved: a run that was refused or failed before that leaves its directory to another."""
        names = (checkpoint.LAST, checkpoint.PREVIOUS, f"{checkpoint.LAST}.damaged", SUMMARY)
        return any(os.path.lexists(self.path / name) for name in names)

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, [] where it cannot be read."""
        try:
            return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]
        except (OSError, ValueError):
            return []

    def best(self) -> int | None:
        """The epoch whose weights are in best.pt, None where that does not load."""
        try:
            epoch: int | None = checkpoint.load(self.path / BEST).get("epoch")
            return epoch
        except CheckpointError:
            return None

    @on_main
    def take_best(self, directory: Path, epoch: int) -> None:
        """Takes over best.pt of the directory that this run was begun in, if it is of this epoch."""
        other = RunDirectory(directory)
        if other.best() == epoch != self.best():
            checkpoint.save(self.path / BEST, checkpoint.load(other.path / BEST))

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
            checkpoint.write_atomically(self.path / CONFIG, to_json(config))

    def read_config(self) -> dict[str, Any] | None:
        """config.json, or None in a new directory. Raises UserError if it cannot be read."""
        return _read_json(self.path / CONFIG, {"recipe": dict, "facts": dict, "starts": list})

    def load_summary(self, epochs: int) -> dict[str, Any] | None:
        """Returns summary.json, or None where the run has not trained for `epochs` (it may have been extended)."""
        summary = _read_json(self.path / SUMMARY, {"epochs": int})
        return summary if summary and summary["epochs"] == epochs else None

    @on_main
    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Makes metrics.jsonl hold `records`, one line an epoch. They stand in the checkpoint too, which decides."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        checkpoint.write_atomically(self.path / METRICS, lines.encode())

    def open_tensorboard(self) -> TensorBoardWriter | None:
        """TensorBoard's files in tensorboard/, in the process that writes files, else None. Raises UserError."""
        return TensorBoardWriter(self.path / "tensorboard") if rank() == 0 else None


def is_run(directory: Path) -> bool:
    """Whether config.json in it is that of a run: others write files of this name beside weights."""
    try:
        return RunDirectory(directory).read_config() is not None
    except UserError:
        return False


def to_json(content: dict[str, Any]) -> bytes:
    """Returns `content` as the bytes of a JSON file."""
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
