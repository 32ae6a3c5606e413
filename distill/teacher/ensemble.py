"""Several teachers as one: the mean of what they answer, each from its own store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.files import checkpoint
from distill.teacher.report import TeacherReport, accuracy
from distill.teacher.teacher import Teacher

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
AnyOptions = TypeVar("AnyOptions", bound=Options)

WAYS = {"logits": "logits", "probabilities": "probabilities at the loss's temperature"}


@dataclass(frozen=True)
class Ensemble:
    """One teacher or several, with their architectures, in the order in which they are given."""

    archs: tuple[str, ...]
    members: tuple[Teacher, ...]
    report: TeacherReport  # of all of them together

    @property
    def digest(self) -> str:
        """That of the one teacher, or of all their digests."""
        digests = [member.digest for member in self.members]
        return digests[0] if len(digests) == 1 else checkpoint.digest(digests)

    @property
    def first(self) -> Teacher:
        return self.members[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies them in a run."""
        return {"teacher_digest": self.digest, "teacher_precision": self.report.precision["precision"]}

    def check_untouched(self) -> None:
        """Raises RuntimeError if a teacher has changed since the start."""
        for member in self.members:
            member.check_untouched()


def add_to_mean(before: Tensor, logits: Tensor, number: int, how: str, temperature: float) -> Tensor:
    """The mean of `number` teachers' logits (B, C), from the mean of those before and the last one's.

    how: `logits`, or `probabilities`: z with softmax(z/T) = the mean of softmax(t_i/T), so that KL at temperature T
    from z is that from the mean of the teachers' distributions.
    """
    if how == "logits":
        return before + (logits - before) / number
    shares = log((number - 1) / number), log(1 / number)
    known, new = (F.log_softmax(value / temperature, 1) for value in (before, logits))
    return temperature * torch.logaddexp(known + shares[0], new + shares[1])


def load_members(
    recipe: AnyRecipe,
    options: AnyOptions,
    load: Callable[[AnyRecipe, AnyOptions], tuple[Teacher, TeacherReport]],
    labels: Tensor,
) -> Ensemble:
    """The teachers of `recipe`, each by `load`, and what they know together; printed if there are several.

    load: takes the recipe and the options of one teacher. labels: of the test images, (N,).
    """
    archs = recipe.teacher_archs
    files = member_files(recipe, options)
    found = [
        load(replace(recipe, teacher_arch=arch, ensemble="logits"), replace(options, teacher_checkpoint=file))
        for arch, file in zip(archs, files, strict=True)
    ]
    members = tuple(teacher for teacher, _ in found)
    reports = [report for _, report in found]
    if len(reports) == 1:
        return Ensemble(archs, members, reports[0])
    logits = reports[0].logits
    for number, other in enumerate(reports[1:], start=2):
        logits = add_to_mean(logits, other.logits, number, recipe.ensemble, recipe.temperature)
    together = replace(reports[0], accuracy=accuracy(logits, labels.cpu()), logits=logits)
    print(f"teachers: together, by the mean of their {WAYS[recipe.ensemble]}, test accuracy {together.accuracy:.2f} %")
    return Ensemble(archs, members, together)


def member_files(recipe: Recipe, options: Options) -> Sequence[str | None]:
    """--teacher-checkpoint of each teacher. Raises UserError unless there is one for each, or one for all."""
    archs = recipe.teacher_archs
    files = options.teacher_checkpoint.split(",") if options.teacher_checkpoint and len(archs) > 1 else []
    if not files:
        return [options.teacher_checkpoint] * len(archs)
    if len(files) == 1 and files[0] in ("published", "none"):
        return files * len(archs)
    if len(files) != len(archs):
        raise UserError(
            f"--teacher-checkpoint names {len(files)} files for the {len(archs)} networks of --teacher-arch: one for "
            "each, with commas between them"
        )
    return files
