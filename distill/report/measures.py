"""What a report measures on predictions: confusion, accuracy per class, calibration, agreement, confident errors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distill.inference.predictions import Predictions

BINS = 15


class Pair(NamedTuple):
    """Images of the class `label` that were taken for `predicted`: how many, and in percent of those of the class."""

    label: int
    predicted: int
    images: int
    percent: float


@dataclass(frozen=True)
class Calibration:
    """How confidence, the largest probability, compares with accuracy; all values are shares in [0, 1].

    ece is the expected calibration error (Guo et al. 2017, arXiv:1706.04599): sum over bins of share * |accuracy -
    confidence|. The bins k/15 < confidence <= (k + 1)/15 are equally wide; of each, shape (15,): the share of the
    images, their mean confidence and their accuracy. The last two are nan where a bin has no images.
    """

    ece: float
    mean_confidence: float
    share: Tensor
    confidence: Tensor
    accuracy: Tensor


class Agreement(NamedTuple):
    """How many images both networks get right, only the teacher, only the student, and neither.

    same: for how many they predict the same class, right or wrong.
    """

    both: int
    only_teacher: int
    only_student: int
    neither: int
    same: int


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns int64 (C, C): how many images of the class of the row were taken for that of the column; both (N,)."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)


def accuracy_per_class(counts: Tensor) -> Tensor:
    """Returns the percent (C,) of each class that is right, from `confusion`; nan for a class without images."""
    return 100 * counts.diagonal().double() / counts.sum(1).double()


def confused_pairs(counts: Tensor, most: int) -> list[Pair]:
    """Returns the pairs of different classes that were confused most often, at most `most`, from `confusion`."""
    classes = len(counts)
    wrong = (counts - torch.diag(counts.diagonal())).flatten()
    values, places = (found[:most].tolist() for found in wrong.sort(descending=True, stable=True))
    totals = counts.sum(1).tolist()
    pairs = [(*divmod(place, classes), count) for place, count in zip(places, values, strict=True)]
    return [Pair(row, column, count, 100 * count / totals[row]) for row, column, count in pairs if count]


def calibration(predictions: Predictions) -> Calibration:
    """Returns how the confidence of `predictions` compares with their accuracy."""
    confidence = predictions.logits.double().softmax(1).amax(1)
    right = (predictions.predictions == predictions.labels).double()
    bins = (torch.ceil(confidence * BINS).long() - 1).clamp(0, BINS - 1)
    count, summed_confidence, summed_right = (
        torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, values)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    ece = (summed_right - summed_confidence).abs().sum() / len(right)
    bin_confidence, bin_accuracy = summed_confidence / count, summed_right / count
    return Calibration(ece.item(), confidence.mean().item(), count / len(right), bin_confidence, bin_accuracy)


def agreement(student: Predictions, teacher: Predictions) -> Agreement:
    """Returns which images student and teacher get right."""
    ours, theirs = student.predictions == student.labels, teacher.predictions == teacher.labels
    same = student.predictions == teacher.predictions
    parts = (ours & theirs, ~ours & theirs, ours & ~theirs, ~ours & ~theirs, same)
    return Agreement(*(int(part.sum()) for part in parts))


def confident_errors(predictions: Predictions, most: int) -> list[int]:
    """Returns the numbers of the wrong images, at most `most`, those with the most confident answer first."""
    confidence = predictions.probabilities.gather(1, predictions.predictions.view(-1, 1)).flatten()
    wrong = torch.where(predictions.predictions != predictions.labels, confidence, -1.0)
    values, places = (found[:most].tolist() for found in wrong.sort(descending=True, stable=True))
    return [place for value, place in zip(values, places, strict=True) if value >= 0]
