"""What a teacher scores on the test images, and how its precision compares with float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.datasets import TestData, spread
from distill.errors import CheckpointError
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
        except CheckpointError as error:
            print(f"{error}; measuring the teacher again")
    if not cached.keys() >= {"logits", "compared"}:
        logits = torch.cat([teacher.logits(images).cpu() for images, _ in test.batches()])
        cached = {"logits": logits.half(), "compared": {"precision": name, **_compared(teacher, logits, test)}}
        checkpoint.save_cache(path, cached)
    logits = cached["logits"].float()
    return TeacherReport(accuracy(logits, test.labels.cpu()), logits, cached["compared"])


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
    if near_chance(report.accuracy, classes := report.logits.shape[1]):
        line = f"the teacher's test accuracy, {report.accuracy:.2f} %, is near chance ({100 / classes:.2f} %)"
        print(f"warning: {line}; wrong weights or data?")
    return report


@torch.no_grad()
def _compared(teacher: Teacher, logits: Tensor, test: TestData) -> dict[str, Any]:
    """Returns how the teacher's logits (N, C) compare with those of its network in float32, on some of the images."""
    network, rounded, exact = teacher.network, [], []
    precision, network.precision = network.precision, choose_precision("float32", network.mean.device)
    for places, images, _ in spread(test, COMPARED):
        rounded.append(logits[places])
        exact += [network(part.to(network.mean.device)).cpu() for part in torch.split(images, BLOCK["cpu"])]
    network.precision = precision
    some, same = torch.cat(rounded), torch.cat(exact)
    agreeing, error = agreement(some.argmax(1), same.argmax(1)), (some - same).abs().mean().item()
    return {"images": len(same), "agreement": agreeing, "error": error}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` (N, C) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def agreement(predictions: Tensor, other: Tensor) -> float:
    """Percent of images (N,) for which two networks predict the same class."""
    return 100 * (predictions == other).double().mean().item()


def near_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy in percent is within a tenth of the way from guessing to 100 %."""
    chance = 100 / classes
    return accuracy < chance + 0.1 * (100 - chance)
