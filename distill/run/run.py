"""A run in progress: what identifies it, when it was started, what has come of it."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distill.config.recipe import Options, Recipe
from distill.errors import OtherRunError
from distill.files import checkpoint
from distill.models.classifier import Classifier, count_parameters
from distill.parallel.devices import describe_device
from distill.parallel.processes import on_main, rank
from distill.run.directory import CONFIG, DIVERGED, SUMMARY, RunDirectory, to_json
from distill.run.identity import disallowed, format_counts, format_diff
from distill.run.outcome import BEST, describe
from distill.run.provenance import commit, machine, versions

STARTED_WITH = ("data", "teacher_checkpoint", "init", "class_order", "skip_bad_images")
"""Options that a start records, beside the directory it began in."""


class Run(RunDirectory):
    """The directory of the run of `recipe`, with the `facts` that identify it beside the recipe.

    facts: digests of data, teacher, initial weights (identity.py); what is not known yet is added later. summary: that
    of the finished run, None until report() has found one.
    """

    def __init__(self, path: Path, recipe: Recipe, options: Options, facts: dict[str, Any] | None = None) -> None:
        """Names a directory; entering the context takes hold of it."""
        super().__init__(path)
        self.recipe, self.options, self.facts = recipe, options, facts or {}
        self.summary: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None  # config.json as it is to be once this start has saved something

    @on_main
    def check(self) -> None:
        """Raises UserError, naming the fields that differ, if the directory holds another run.

        Facts are compared as far as they are known. --extend lets `epochs` grow, --allow-data-change lets the images be
        others.
        """
        config = self.read_config()
        if not config or not self.has_begun():
            return
        before = type(self.recipe).from_dict(config["recipe"]).to_dict()
        before |= {key: value for key, value in config["facts"].items() if key in self.facts}
        now = {**self.recipe.to_dict(), **self.facts}
        if changed := disallowed(before, now, self.recipe, self.options):
            longer = changed == ["epochs"] and now["epochs"] > before["epochs"]
            hint = "--extend continues with more epochs, " if longer else ""
            if "data_digest" in changed and not self.recipe.remembers_images:
                hint += f"--allow-data-change goes on with {format_counts(before, now)}, "
            hint += f"{self.options.elsewhere} starts a new one"
            raise OtherRunError(f"{self.path} holds another run: {format_diff(changed, before, now)}", hint)

    def report(self) -> None:
        """Sets `summary` and prints the result, if the run is finished."""
        self.summary = self._reported()

    @on_main
    def _reported(self) -> dict[str, Any] | None:
        summary = self.load_summary(self.recipe.epochs)
        if summary:
            print(f"finished before: {self.path}\n{describe(summary, self.best())}")
            config = self.read_config()
            taught_by = config["starts"][-1].get("teacher_checkpoint") if config and config["starts"] else None
            if taught_by and taught_by != self.options.teacher_checkpoint:
                print(f"note: it was taught by --teacher-checkpoint {taught_by}")
            if self.options.tensorboard and (writer := self.open_tensorboard()):
                writer.show(self.records())
        return summary

    @on_main
    def record_start(self, device: torch.device) -> None:
        """Records in config.json that this process starts or continues the run.

        Of a run that has begun it is recorded by accept(). Prints a line where the images, torch or the device are not
        those of the last start.
        """
        config = self.read_config()
        begun = config if config and self.has_begun() else None
        starts = begun["starts"] if begun else []
        start: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "argv": sys.argv, "commit": commit()}
        start |= {"cwd": os.getcwd(), **{name: getattr(self.options, name) for name in STARTED_WITH}}
        start |= {"versions": versions(), "machine": machine(device)}
        for what, value in (("versions", start["versions"]), ("device", start["machine"]["device"])):
            former = {**starts[-1], **starts[-1]["machine"]}[what] if starts else value
            if former != value:
                print(f"note: {what} {former} before, {value} now: the result may differ in the last bits")
        self._pending = {"recipe": self.recipe.to_dict(), "facts": self.facts, "starts": [*starts, start]}
        if not begun:
            self._accept()
        elif change := self._changed(begun["facts"]):
            start["data_change"] = change
        else:
            self._pending["broken"] = begun.get("broken", {})

    @on_main
    def accept(self) -> None:
        """Makes config.json say what this start trains by, once something has been saved that was trained by it.

        A start with a wrong flag that is ended before, or refused by the checkpoint, thus changes nothing.
        """
        self._accept()

    def _accept(self) -> None:
        if self._pending:
            checkpoint.write_atomically(self.path / CONFIG, to_json(self._pending))
            (self.path / DIVERGED).unlink(missing_ok=True)  # this start may end otherwise
        self._pending = None

    def _changed(self, before: dict[str, Any]) -> dict[str, Any]:
        """Returns how the images differ from those before, {} where they do not; if they do, says so."""
        now = self.facts
        if before["data_digest"] == now["data_digest"]:
            return {}
        print(f"--allow-data-change: the run goes on with {format_counts(before, now)}")
        if self.recipe.val_split:
            print(
                "warning: the validation part is drawn anew, and has images that were trained on before: what is "
                "chosen on it is too optimistic"
            )
        return {key: [before.get(key), now.get(key)] for key in ("data_digest", "images")}

    @on_main
    def finish(self, student: Classifier, **results: Any) -> dict[str, Any]:
        """Writes, prints and returns summary.json: what the run is, what computed it, and `results`.

        results: percent, nats, seconds.
        """
        best_kept = self.best()
        self._accept()
        if best := results.get("best_epoch"):
            best["weights"] = BEST if best_kept == best["epoch"] else None
        summary = self._summary(student, **results)
        starts = (self.read_config() or {"starts": []})["starts"]
        changes = [start["data_change"] for start in starts if "data_change" in start]
        summary |= {"data_changes": changes} if changes else {}
        checkpoint.write_atomically(self.path / SUMMARY, to_json(summary))
        print(describe(summary, best_kept))
        return summary

    def _trained_by_commit(self) -> str | None:
        """Returns the commit of the last start: the checkout may have changed since."""
        starts = (self._pending or self.read_config() or {}).get("starts")
        found: str | None = starts[-1]["commit"] if starts else commit()
        return found

    def record_divergence(self, student: Classifier, step: int, **results: Any) -> None:
        """Writes diverged.json: what summary.json would say, without a result, and the step that was not finite.

        Only the first process writes, and no process waits for another.
        """
        if rank() == 0:
            summary = self._summary(student, test_accuracy=None, wall_seconds=None, diverged={"step": step}, **results)
            checkpoint.write_atomically(self.path / DIVERGED, to_json(summary))

    def _summary(self, student: Classifier, **results: Any) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "arch": recipe.arch,
            "teacher_arch": recipe.teacher_arch,
            "objective": recipe.objective,
            "trained_by": recipe.trained_by,
            "method": recipe.method.to_dict() if recipe.method else None,
            "features": recipe.features.to_dict() if recipe.features else None,
            "formula": recipe.formula or None,
            "seed": recipe.seed,
            "view_seed": recipe.view_seed,
            "data": {"name": self.facts["data"], "digest": self.facts["data_digest"]},
            "augment": recipe.augment,
            "epochs": recipe.epochs,
            "world_size": self.facts["world_size"],
            "teacher_accuracy": None,
            "agreement": None,
            **results,
            "parameters": count_parameters(student.network),
            "precision": str(student.precision).removeprefix("torch."),
            "device": describe_device(student.mean.device),
            "torch": str(torch.__version__),
            "commit": self._trained_by_commit(),
        }
