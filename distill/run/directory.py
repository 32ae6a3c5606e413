"""One run, one directory: who holds it, what it is, what it has measured."""

import glob
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from distill.config.method_flags import FEATURE_FLAGS, METHOD_FLAGS
from distill.config.recipe import Options, Recipe, flatten
from distill.data.datasets import Images
from distill.errors import UserError
from distill.files import checkpoint
from distill.files.lock import DirectoryLock
from distill.models.classifier import Classifier, count_parameters
from distill.options import flag
from distill.parallel.devices import describe_device, replicas
from distill.parallel.processes import on_main, rank
from distill.run import provenance
from distill.run.outcome import BEST, describe
from distill.run.provenance import commit, machine, versions
from distill.run.tensorboard import TensorBoardWriter

ROOT = provenance.ROOT
CHECKPOINTS = Path(os.environ.get("DISTILL_CHECKPOINTS") or ROOT / "checkpoints")  # e.g. a cluster's scratch disk
CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
FOR_READING = ("data", "images")  # facts that are no part of a run: what a directory of images is called, their count


class RunDirectory:
    """A directory with config.json, metrics.jsonl, checkpoints and summary.json, held by one process at a time.

    Use as a context manager. Entering raises UserError, naming the holder, if another process holds it (hold.py). Of
    several processes of one run rank 0 holds it, reads and writes; the others get what it returns.
    """

    def __init__(self, path: Path, *, tensorboard: bool = False) -> None:
        """tensorboard: a run that turns out to be finished is shown there too."""
        self.path, self.tensorboard = path, tensorboard
        self._lock: DirectoryLock | None = None

    def __enter__(self) -> "RunDirectory":
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
        except checkpoint.CheckpointError:
            return None

    @on_main
    def take_best(self, directory: Path, epoch: int) -> None:
        """Take over best.pt of the directory that this run was begun in, if it is of this epoch."""
        other = RunDirectory(directory)
        if other.best() == epoch != self.best():
            checkpoint.save(self.path / BEST, checkpoint.load(other.path / BEST))

    @on_main
    def report(self, recipe: Recipe) -> dict[str, Any] | None:
        """The summary, after printing it, if the run is finished."""
        return self._report(recipe)

    def _report(self, recipe: Recipe) -> dict[str, Any] | None:
        summary = self.finished(recipe)
        if summary:
            print(f"finished before: {self.path}\n{describe(summary, self.best())}")
            if self.tensorboard and (board := self.open_tensorboard()):
                board.show(self.records())
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
        kept = self.best()
        if best := results.get("best_epoch"):
            best["weights"] = BEST if kept == best["epoch"] else None
        summary: dict[str, Any] = {
            "arch": recipe.arch,
            "teacher_arch": recipe.teacher_arch,
            "objective": recipe.objective,
            "trained_by": recipe.trained_by,
            "method": recipe.method.to_dict() if recipe.method else None,
            "features": recipe.features.to_dict() if recipe.features else None,
            "formula": recipe.formula or None,
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
        print(describe(summary, kept))
        return summary

    @on_main
    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Make metrics.jsonl hold `records`, one line an epoch. They stand in the checkpoint too, which decides."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        checkpoint.write_atomically(self.path / METRICS, lines.encode())

    def open_tensorboard(self) -> TensorBoardWriter | None:
        """TensorBoard's files in tensorboard/, in the process that writes files, else None. Raises UserError."""
        return TensorBoardWriter(self.path / "tensorboard") if rank() == 0 else None


def identity(data: Images, init_digest: str | None, device_name: str) -> dict[str, Any]:
    """The facts of a run that are known before its teacher is: its images, initial weights and parts of a batch."""
    named = {"data": data.name, "data_digest": data.digest, "images": data.counts}
    return {**named, "init_digest": init_digest, "world_size": replicas(device_name)}


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields in which two runs (recipe and facts together) differ, those of the method by its flags."""
    before, now = flatten(before), flatten(now)
    return [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in FOR_READING]


def _counts(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`23 training, 8 test images (24 training, 8 test images before)`, of what facts say of the images."""
    same = before.get("images") == now.get("images")
    return f"{now.get('images')} ({'as many, but others,' if same else before.get('images')} before)"


def tell(changed: list[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    """`--lr was 0.1, is 0.2, data_digest was 1, is 2`: flags of the recipe, and facts."""
    before, now = flatten(before), flatten(now)
    known = {name for owner in (Recipe, *Recipe.__subclasses__()) for name in vars(owner)["__dataclass_fields__"]}
    known = known - {"features"} | {*METHOD_FLAGS, *FEATURE_FLAGS}
    shown = [{key: str(values.get(key))[:24] for key in changed} for values in (before, now)]  # of a digest enough
    return ", ".join(f"{flag(k) if k in known else k} was {shown[0][k]}, is {shown[1][k]}" for k in changed)


def open_run(options: Options, recipe: Recipe, data: Images) -> RunDirectory:
    """The directory of a run: --output, or checkpoints/DATA/ARCH/RUN; with --fresh the next name that is free.

    Where DATA has no such run yet, one of this recipe on the same images under another DATA is it: a job finds its run
    wherever its images are staged.
    """
    return RunDirectory(_place(options, recipe, data.name, data.digest), tensorboard=options.tensorboard)


@on_main
def _place(options: Options, recipe: Recipe, data_name: str, data_digest: str) -> Path:
    own = CHECKPOINTS / data_name / recipe.arch / recipe.run_name
    path = Path(options.output) if options.output else own
    if options.fresh and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise UserError("--fresh would start over at each restart: name a new --output in place of it")
    if options.fresh and path.exists():
        path = next_free(path)
        print(f"starting over in {path}; to continue it, --output {path} in place of --fresh")
    if options.fresh or options.output:
        return path
    known = runs_on(data_digest, recipe.arch, glob.escape(recipe.run_name), data_name)
    found = [run for run, config in known if _is_of(config, recipe, options.extend)]
    if found:  # of several under other names the one that is furthest
        path = max(found, key=lambda run: (run.has_begun(), run.path == own, len(run.records()))).path
    if path != own:
        print(f"note: {path} is the run of this recipe on these images, under another name of theirs")
    return path


def _is_of(config: dict[str, Any], recipe: Recipe, extend: bool) -> bool:
    """Whether config.json is of `recipe`; `extend`: or of fewer epochs of it."""
    try:
        before = type(recipe).from_dict(config["recipe"])
    except (UserError, TypeError):  # of another version, or of another kind of images
        return False
    changed = differing(before.to_dict(), recipe.to_dict())
    return not changed or (extend and changed == ["epochs"] and before.epochs < recipe.epochs)


def runs_on(data_digest: str, arch: str, pattern: str, data_name: str) -> Iterator[tuple[RunDirectory, dict[str, Any]]]:
    """The runs of `arch` in directories called `pattern` on images of this digest, under any name of theirs, that of
    `data_name` first: each with its config.json. Raises UserError for one of that name that cannot be read."""
    for place in sorted(CHECKPOINTS.glob("*"), key=lambda place: (place.name != data_name, place.name)):
        for path in sorted((place / arch).glob(pattern)):
            run = RunDirectory(path)
            try:
                config = run.read_config()
            except UserError:
                if place.name == data_name:
                    raise
                continue
            if config and config["facts"].get("data_digest") == data_digest:
                yield run, config


def next_free(path: Path) -> Path:
    """`path`, or with the first of -2, -3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


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
