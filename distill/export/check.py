"""Whether a file computes what the network computes, on real images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.datasets import TestData, spread
from distill.errors import UserError
from distill.inference.predictions import Predictions
from distill.models.classifier import Classifier

Run = Callable[[Tensor], Tensor]
"""A file at work: images float32 (B, 3, S, S) in [0, 1] -> logits (B, C)."""
SMALL = 10_000  # test images that are all looked at
SOME = 1_000  # of more than these
DIFFERENCE = 1e-3  # of the largest logit
AGREEMENT = 99.9  # percent


class ExportError(UserError):
    """A file that could not be made, or is not what it should be."""

    exit_code = 1


@dataclass(frozen=True)
class Comparison:
    """difference: the largest of a logit, relative to the largest logit. agreement: percent of equal arg max."""

    images: int
    difference: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"on {self.images} test images the largest difference of a logit is {self.difference:.1e} of the largest "
            f"logit, the predicted classes agree on {self.agreement:.2f} %"
        )


def test_images(data: TestData) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the test images that files are compared on, and their labels."""
    for _, images, labels in spread(data, SOME if len(data.labels) > SMALL else SMALL):
        yield images, labels


@torch.no_grad()
def predict(classifier: Classifier, data: TestData) -> Predictions:
    """Returns what `classifier` says to `test_images`."""
    classifier.eval()
    pairs = [(classifier(images), labels) for images, labels in test_images(data)]
    logits, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    return Predictions(logits, labels, logits.argmax(1))


@torch.no_grad()
def compare(run: Run, classifier: Classifier, data: TestData, expected: Predictions) -> Comparison:
    """Compares a file with what the network said to the same images. Raises ExportError where they are not the same."""
    given = torch.cat([run(classifier.resize(images) / 255) for images, _ in test_images(data)])
    largest = expected.logits.abs().max().clamp_min(1e-30)  # a last layer may start from zeros
    difference = ((given - expected.logits).abs().max() / largest).item()
    agreement = 100 * (given.argmax(1) == expected.logits.argmax(1)).double().mean().item()
    found = Comparison(len(given), difference, agreement)
    if not (difference <= DIFFERENCE and agreement >= AGREEMENT):  # a NaN is refused too
        raise ExportError(f"the file does not compute what the network does, and is not kept: {found}")
    return found


@torch.no_grad()
def accuracy(run: Run, classifier: Classifier, data: TestData) -> float:
    """Returns the percent of all the images that a file predicts right."""
    right = [run(classifier.resize(images) / 255).argmax(1) == labels for images, labels in data.batches()]
    return 100 * torch.cat(right).double().mean().item()
