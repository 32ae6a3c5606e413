"""Data sets: batches to train on, images to evaluate on, and what a run has to know of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.draws import ViewDraws
from distill.data.order import EpochPlan, Selection
from distill.data.views import ViewPolicy, Views, mix
from distill.losses.top_k import TopKLogits


class Images(Protocol):
    """What runs and stores know of their images: `digest` tells them apart, `name` and `counts` are for people."""

    @property
    def name(self) -> str:  # noqa: D102
        ...

    @property
    def digest(self) -> str:  # noqa: D102
        ...

    @property
    def classes(self) -> tuple[str, ...]:  # noqa: D102
        ...

    @property
    def counts(self) -> str:  # noqa: D102
        ...


class Mixture(NamedTuple):
    """What the images of a batch are mixed with: the partners' labels int64 (B,), and the mixing coefficients (B,).

    A coefficient, float32 in [0, 1], is the weight of the image itself.
    """

    labels: Tensor
    coefficient: Tensor


@dataclass(frozen=True)
class Batch:
    """The input of one step.

    images: uint8 (B, H, W, 3), labels: int64 (B,). indices: int64 (B,), on the CPU, the images' numbers in the whole
    training set. teacher_logits: float32 (B, C), or what is kept of them, where a teacher takes part. epoch: from 0,
    for losses whose weight depends on it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    mixture: Mixture | None = None
    teacher_logits: Tensor | TopKLogits | None = None
    epoch: int = 0

    def split(self, count: int) -> "list[Batch]":
        """Returns the batch in `count` equal parts, in order."""
        size = len(self.labels) // count
        return [self._part(slice(k * size, (k + 1) * size)) for k in range(count)]

    def _part(self, rows: slice) -> "Batch":
        mixture, teacher_logits = _rows(self.mixture, rows), _rows(self.teacher_logits, rows)
        return Batch(self.images[rows], self.labels[rows], self.indices[rows], mixture, teacher_logits, self.epoch)


def _rows(value: Any, rows: slice) -> Any:
    """Returns the rows of a tensor, of each tensor of a tuple, or None of None."""
    if isinstance(value, tuple):
        return type(value)(*(tensor[rows] for tensor in value))
    return None if value is None else value[rows]


class TrainingData(ABC):
    """What a run trains on: any position of any epoch can be asked for, and is always the same.

    With `mixup` (Zhang et al. 2017, arXiv:1710.09412, with Beta(1, 1)) the mixture is part of the view: image i in view
    v is mixed with the same view of a partner, u * image + (1 - u) * partner, rounded to uint8. Partner and coefficient
    u, uniform in [0, 1), are drawn for (view seed, i, v) from the whole training subset, so that nothing depends on the
    batch.
    """

    labels: Tensor  # int64 (N,), negative where there are none
    plan: EpochPlan
    policy: Views
    mixup: bool
    labelled: bool
    from_files: bool  # read while it trains, so that a batch may raise BrokenImage
    image_count: int
    device: torch.device  # where batches are

    @property
    def steps_per_epoch(self) -> int:
        """The batches of an epoch."""
        return self.plan.steps_per_epoch

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of `epoch` from `first_step` on."""
        return self.render(self.plan.shuffle(epoch, first_step)[0])

    @abstractmethod
    def render(self, selections: Iterable[Selection]) -> Iterator[Batch]:
        """Yields the batch of each selection; the next ones may be in the making meanwhile."""

    def _partners(self, drawn: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Returns the partners' numbers and the mixing coefficients, both (B,); drawn: (B, 2 or more) in [0, 1]."""
        subset = self.plan.indices
        places = np.minimum(drawn[:, 0] * len(subset), len(subset) - 1).astype(np.int64)
        return subset[places], drawn[:, 1].astype(np.float32)


class TensorData(TrainingData):
    """Training data that lies in memory as one tensor, on the CPU or a GPU; views are rendered where it lies."""

    policy: ViewPolicy
    from_files = False

    def __init__(
        self, images: Tensor, labels: Tensor, plan: EpochPlan, policy: ViewPolicy, mixup: ViewDraws | None = None
    ) -> None:
        """Takes images uint8 (N, H, W, 3) and labels int64 (N,), on one device.

        Labels are negative where there are none. mixup: draws of two columns.
        """
        self.images, self.labels, self.plan, self.policy = images, labels, plan, policy
        self.mixup, self._draws = mixup is not None, mixup
        self.image_count, self.device = len(images), images.device
        self.labelled = bool((labels >= 0).all())

    def render(self, selections: Iterable[Selection]) -> Iterator[Batch]:
        """Yields the batch of each selection."""
        return map(self._batch, selections)

    def _batch(self, selection: Selection) -> Batch:
        indices, views = torch.from_numpy(selection.indices), torch.from_numpy(selection.views)
        images, labels = self._rendered(indices, views)
        mixture = None
        if self._draws:
            partners, drawn = self._partners(self._draws.rows(indices, views))
            coefficient = torch.from_numpy(drawn).to(self.device, non_blocking=True)
            others, mixed_labels = self._rendered(torch.from_numpy(partners), views)
            images, mixture = mix(images, others, coefficient), Mixture(mixed_labels, coefficient)
        return Batch(images, labels, indices, mixture, epoch=selection.epoch)

    def _rendered(self, indices: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the images `indices` (B,) in the views (B,), and their labels."""
        rows = indices.to(self.device, non_blocking=True)
        return self.policy.render(self.images[rows], indices, views), self.labels[rows]


class TestData(Protocol):
    """What a network is evaluated on: each image is seen exactly once."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        ...

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images uint8 (B, H, W, 3) and labels (B,).

        Process `rank` gets its part of `world_size` consecutive ones; each image is in one of them.
        """
        ...


PART = 8  # images that follow one another in what `spread` yields


def spread(data: TestData, count: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields about `count` of the images, spread evenly, since they may come class by class; all if there are no more.

    Each is a part of them: their places among all, images uint8 (B, H, W, 3), labels (B,).
    """
    total = len(data.labels)
    parts, taken = (total // PART, count // PART) if total > count else (1, 1)
    for number in range(taken):
        part = number * parts // taken
        first = total * part // parts
        for images, labels in data.batches(part, parts):
            yield slice(first, first + len(images)), images, labels
            first += len(images)


@dataclass(frozen=True)
class TensorTestData:
    """Images to evaluate on, as a TestData: uint8 (N, H, W, 3), labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor
    batch_size: int = 256

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels, as TestData says."""
        first, last = (len(self.labels) * k // world_size for k in (rank, rank + 1))
        for start in range(first, last, self.batch_size):
            stop = min(start + self.batch_size, last)
            yield self.images[start:stop], self.labels[start:stop]
