"""Several teachers as one: the mean of their logits."""

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
    def facts(self) -> dict[str, Any]:
        """What identifies them in a run."""
        return {"teacher_digest": self.digest, "teacher_precision": self.report.precision["precision"]}

    @property
    def digest(self) -> str:
        """That of the one teacher, or of all their digests."""
        return joint_digest([member.digest for member in self.members])

    @property
    def first(self) -> Teacher:
        """The one teacher, or the first of them."""
        return self.members[0]

    def check_untouched(self) -> None:
        """Raises RuntimeError if a teacher has changed since the start."""
        for member in self.members:
            member.check_untouched()


def joint_digest(digests: Sequence[str]) -> str:
    """Returns the digest of the one teacher, or of all their digests."""
    return digests[0] if len(digests) == 1 else checkpoint.digest(list(digests))


def mean_logits(members: Sequence[Tensor], how: str, temperature: float) -> Tensor:
    """Returns the mean of the logits (B, C) of one teacher or several.

    how: `logits`, or `probabilities`: z with softmax(z/T) = the mean of softmax(t_i/T), so that KL at temperature T
    from z is that from the mean of the teachers' distributions.
    """
    mean = members[0]
    for number, logits in enumerate(members[1:], start=2):
        if how == "logits":
            mean = mean + (logits - mean) / number
        else:
            former, new = (F.log_softmax(value / temperature, 1) for value in (mean, logits))
            mean = temperature * torch.logaddexp(former + log((number - 1) / number), new + log(1 / number))
    return mean


def load_members(
    recipe: AnyRecipe,
    options: AnyOptions,
    load: Callable[[AnyRecipe, AnyOptions], tuple[Teacher, TeacherReport]],
    labels: Tensor,
) -> Ensemble:
    """Returns the teachers of `recipe`, each by `load`, with what they score together; printed if there are several.

    load: takes the recipe and the options of one teacher. labels: of the test images, (N,).
    """
    archs = recipe.teacher_archs
    loaded = [load(*of_one) for of_one in one_by_one(recipe, options)]
    members, reports = zip(*loaded, strict=True)
    if len(reports) == 1:
        return Ensemble(archs, members, reports[0])
    logits = mean_logits([report.logits for report in reports], recipe.ensemble, recipe.temperature)
    together = replace(reports[0], accuracy=accuracy(logits, labels.cpu()), logits=logits)
    print(f"teachers: together, by the mean of their {WAYS[recipe.ensemble]}, test accuracy {together.accuracy:.2f} %")
    return Ensemble(archs, members, together)


def one_by_one(recipe: AnyRecipe, options: AnyOptions) -> list[tuple[AnyRecipe, AnyOptions]]:
    """Returns recipe and options of each teacher by itself. Raises UserError as member_files does."""
    pairs = zip(recipe.teacher_archs, member_files(recipe, options), strict=True)
    return [
        (replace(recipe, teacher_arch=arch, ensemble="logits"), replace(options, teacher_checkpoint=file))
        for arch, file in pairs
    ]


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
