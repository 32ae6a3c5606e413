"""What a teacher scores on the test images, and how its precision compares with float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.datasets import TestData
from distill.files import checkpoint
from distill.parallel.devices import choose_precision
from distill.parallel.processes import first_here
from distill.teacher.teacher import BLOCK, Teacher

COMPARED = 1000  # images on which a rounded teacher is compared with its float32 form


@dataclass(frozen=True)
class TeacherReport:
    """How a teacher does on the test images: its accuracy in percent, its logits (N, C), and its precision.

    `precision` has its name, and how the logits compare with those in float32: `images` compared, `agreement` of the
    arg max in percent, and `error`, the mean absolute difference of a logit.
    """

    accuracy: float
    logits: Tensor
    precision: dict[str, Any]


def examine(teacher: Teacher, test: TestData, data_digest: str, cache: Path) -> TeacherReport:
    """Returns the report of `teacher`; it is made once for teacher, data, precision and kind of device.

    It is kept under `cache`; a damaged file there is named and made anew.
    """
    name = str(teacher.network.precision).removeprefix("torch.")
    path = cache / f"{teacher.digest[:24]}-{data_digest[:24]}-{name}-{teacher.network.mean.device.type}.pt"
    cached: dict[str, Any] = {}
    if path.exists():
        try:
            cached = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            print(f"{error}; measuring the teacher again")
    if not cached.keys() >= {"logits", "precision"}:
        logits, exact = _logits(teacher, test)
        compared = {"images": len(exact), "agreement": agreement(logits[: len(exact)].argmax(1), exact.argmax(1))}
        compared["error"] = (logits[: len(exact)] - exact).abs().mean().item()
        cached = {"logits": logits.half(), "precision": {"precision": name, **compared}}
        checkpoint.save_cache(path, cached)
    logits = cached["logits"].float()
    return TeacherReport(accuracy(logits, test.labels.cpu()), logits, cached["precision"])


def introduce(teacher: Teacher, test: TestData, data_digest: str, name: str, cache: Path) -> TeacherReport:
    """Returns what `examine` does and prints it, with a warning for a teacher that is hardly better than guessing.

    name: of the teacher, and where it comes from. Of several processes on a machine one examines it.
    """
    with first_here():
        report = examine(teacher, test, data_digest, cache)
    compared = report.precision
    print(f"teacher: {name}, test accuracy {report.accuracy:.2f} %")
    exact = compared["precision"] == "float32" and compared["agreement"] == 100
    if not exact:
        print(
            f"teacher: in {compared['precision']} its arg max agrees with float32 on {compared['agreement']:.2f} % of "
            f"{compared['images']} test images, a logit differs by {compared['error']:.2g} on average"
        )
    if warning := chance_warning(report.accuracy, report.logits.shape[1]):
        print(warning)
    return report


@torch.no_grad()
def _logits(teacher: Teacher, test: TestData) -> tuple[Tensor, Tensor]:
    """Returns the teacher's logits (N, C) of all images, and of the first of them those of its network in float32."""
    network, logits, exact, compared = teacher.network, [], [], 0
    for images, _ in test.batches():
        logits.append(teacher.logits(images).cpu())
        if (wanted := COMPARED - compared) > 0:
            precision, network.precision = network.precision, choose_precision("float32", network.mean.device)
            parts = torch.split(images[:wanted].to(network.mean.device), BLOCK["cpu"])
            exact += [network(part).cpu() for part in parts]
            network.precision = precision
            compared += len(images[:wanted])
    return torch.cat(logits), torch.cat(exact)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` (N, C) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def agreement(predictions: Tensor, other: Tensor) -> float:
    """Percent of images (N,) for which two networks predict the same class."""
    return 100 * (predictions == other).double().mean().item()


def chance_warning(accuracy: float, classes: int) -> str | None:
    """A line of warning for a teacher that is hardly better than guessing: within a tenth of the way to 100 %."""
    chance = 100 / classes
    if accuracy >= chance + 0.1 * (100 - chance):
        return None
    line = f"the teacher's test accuracy, {accuracy:.2f} %, is near chance ({chance:.2f} %)"
    return f"warning: {line}; wrong weights or data?"
