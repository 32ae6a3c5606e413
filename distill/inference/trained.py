"""A trained network as a person names it: by a run's directory, or by a file of weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import checkpoint
from distill.models import weights as files
from distill.models.weights import Weights
from distill.run.directory import RunDirectory, is_run

WORDS = ("sample", "published", "none")  # that stand for data or a teacher's weights, and are no paths


@dataclass(frozen=True)
class Trained:
    """Weights, and what is known of the run that they come from.

    path: what was named. config, summary: the run's config.json and summary.json; {} and None for a file by itself and
    for a run that is not finished. records: the lines of metrics.jsonl.
    """

    path: Path
    weights: Weights
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    records: tuple[Mapping[str, Any], ...] = ()

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe that it was trained by, {} if nobody says."""
        return self.config.get("recipe") or self.weights.recipe or {}

    @property
    def arch(self) -> str | None:
        """The name of its architecture, None if nobody says."""
        return self.weights.arch or self.recipe.get("arch")

    @property
    def name(self) -> str:
        """What it is called beside others: the name of its directory, or of its file without the ending."""
        return self.path.stem if self.path.is_file() and not self.config else self.directory.resolve().name

    @property
    def directory(self) -> Path:
        """The directory that it lies in: of a run its own."""
        return self.path if self.path.is_dir() else self.path.resolve().parent

    @property
    def in_run(self) -> bool:
        """Whether it is of a run, whose directory may take files about it."""
        return bool(self.config)

    @property
    def unfinished(self) -> str:
        """Returns `not finished: 3 of 60 epochs` of a run that is not at its end, else nothing."""
        epochs = self.recipe.get("epochs")
        if not self.in_run or (self.summary and self.summary["epochs"] == epochs):
            return ""
        return f"not finished: {len(self.records)} of {epochs} epochs"

    @property
    def last_start(self) -> Mapping[str, Any]:
        """What config.json says of the last start of its run, {} where there is none."""
        starts: list[Mapping[str, Any]] = self.config.get("starts") or [{}]
        return starts[-1]

    def started_with(self, name: str) -> str | None:
        """Returns what the last start of its run was given as `data` or `teacher_checkpoint`, as paths that hold.

        None where it was not given, or nobody says.
        """
        start = self.last_start
        value: str | None = start.get(name)
        several = name == "teacher_checkpoint" and "," in (self.recipe.get("teacher_arch") or "")
        parts = (value or "").split(",") if several else [value or ""]
        found = [part if part in WORDS or not part else os.path.join(start["cwd"], part) for part in parts]
        return ",".join(found) if value else value


def find_trained(named: str, which: str | None = None) -> Trained:
    """Returns the network of a run's directory (its last whole checkpoint), or of a file. Raises UserError.

    which: `raw` or `ema`, where a file holds weights and their average; None is what counts.
    """
    path = Path(named)
    if not path.exists():
        raise UserError(f"{named} does not exist: name a run's directory or a file of weights")
    if path.is_dir() and not is_run(path) and (path / checkpoint.LAST).is_file():  # copied without its config.json
        path = path / checkpoint.LAST
    if path.is_dir():
        return _of_run(path, path / checkpoint.LAST, which, named)
    if is_run(path.resolve().parent):
        return _of_run(path.resolve().parent, path, which, named)
    return Trained(path, files.load(path, which))


def _of_run(directory: Path, file: Path, which: str | None, named: str) -> Trained:
    """Returns the weights in `file` with what the run in `directory` says of itself."""
    run = RunDirectory(directory)
    config = run.read_config()
    if config is None or not run.has_begun():
        below = sorted(str(found.parent) for found in directory.rglob(checkpoint.LAST))
        saved = "has saved nothing yet" if config else "is no run: it has no config.json"
        raise UserError(f"{named} {saved}{f'; runs in it are {_listed(below)}' if below else ''}")
    try:
        weights = files.load(file, which)
    except UserError:
        previous = directory / checkpoint.PREVIOUS
        if file.name != checkpoint.LAST or not previous.exists():
            raise
        print(f"note: {file} does not load: {previous.name} is taken, the checkpoint before it")
        weights = files.load(previous, which)
    epochs = config["recipe"].get("epochs", 0)
    return Trained(Path(named), weights, config, run.load_summary(epochs), tuple(run.records()))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
