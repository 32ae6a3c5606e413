"""Data sets: batches to train on, images to evaluate on, and what a run has to know of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.draws import ViewDraws
from distill.data.order import EpochPlan
from distill.data.views import ViewPolicy, mix


class Images(Protocol):
    """What runs and stores have to know of the images they are about: they are told apart by `digest`; `name` is for
    people.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def counts(self) -> str: ...


@dataclass(frozen=True)
class Mixture:
    """What the images of a batch are mixed with: the partners' labels int64 (B,), and the mixing coefficient float32
    (B,) in [0, 1], the weight of the image itself.
    """

    labels: Tensor
    coefficient: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's input. images: uint8 (B, H, W, 3), the rest int64 (B,); `indices` count in the whole training set.
    teacher_logits: float32 (B, C) where a teacher takes part, or what is kept of them, kd_loss.TopKLogits. epoch: from
    0, for losses whose weight depends on it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    views: Tensor
    mixture: Mixture | None = None
    teacher_logits: Any = None
    epoch: int = 0

    def parts(self, count: int) -> "list[Batch]":
        """The batch in `count` equal parts, in order."""
        size = len(self.labels) // count
        return [self._rows(slice(k * size, (k + 1) * size)) for k in range(count)]

    def _rows(self, rows: slice) -> "Batch":
        def cut(value: Any) -> Any:
            if isinstance(value, tuple):  # of tensors, such as kd_loss.TopKLogits
                return type(value)(*map(cut, value))
            return None if value is None else value[rows]

        mixture = Mixture(self.mixture.labels[rows], self.mixture.coefficient[rows]) if self.mixture else None
        own = (self.images[rows], self.labels[rows], self.indices[rows], self.views[rows])
        return Batch(*own, mixture, cut(self.teacher_logits), self.epoch)


class TrainingData(Protocol):
    """What the engine trains on: any position of any epoch can be asked for, and is always the same."""

    steps_per_epoch: int
    labelled: bool
    from_files: bool  # read while it trains, so that a batch may raise BrokenImage

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `first_step` on."""
        ...


class ViewedData(TrainingData, Protocol):
    """Training data that a teacher can be asked about: any images in any views of theirs."""

    plan: "EpochPlan"
    policy: Any  # Views
    mixup: Any  # whether views are mixtures
    image_count: int
    device: torch.device  # where views are rendered

    def show(self, steps: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Iterator[Batch]:
        """For each (images, views), both (B,), the batch of them; what follows may be in the making meanwhile."""
        ...


class TestData(Protocol):
    """What a network is evaluated on."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        ...

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (B, H, W, 3) and labels (B,); process `rank` gets its part of `world_size`
        consecutive ones, and each image is in one of them.
        """
        ...


class TensorData:
    """Training data that lies in memory as one tensor, on the CPU or a GPU; views are rendered where it lies.

    `mixup` (Zhang et al. 2017, arXiv:1710.09412, with Beta(1, 1)) is part of the view: image i in view v is mixed with
    the same view of a partner, u * own + (1 - u) * partner, rounded to uint8. Partner and coefficient u, uniform in
    [0, 1), are drawn for (view seed, i, v) from the whole training subset, so that nothing depends on the batch.
    """

    from_files = False

    def __init__(
        self, images: Tensor, labels: Tensor, plan: EpochPlan, policy: ViewPolicy, mixup: ViewDraws | None = None
    ) -> None:
        """images: uint8 (N, H, W, 3), labels: int64 (N,), on one device, negative where there are none; mixup: draws of
        two columns.
        """
        self.images, self.labels, self.plan, self.policy, self.mixup = images, labels, plan, policy, mixup
        self.image_count, self.device = len(images), images.device
        self.steps_per_epoch, self.labelled = plan.steps_per_epoch, bool((labels >= 0).all())

    def examples(self, count: int = 5000) -> Tensor:
        """The first `count` of the images that are trained on, as they are: uint8 (count, H, W, 3)."""
        return self.images[torch.from_numpy(self.plan.indices[:count]).to(self.device)]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        return self.show(self.plan.steps(epoch, first_step))

    def show(self, steps: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Iterator[Batch]:
        """For each (images, views), both (B,), the batch of them."""
        return (self.batch(chosen, shown) for chosen, shown in steps)

    def batch(self, chosen: NDArray[np.int64], shown: NDArray[np.int64]) -> Batch:
        """The images `chosen` (B,) in the views `shown` (B,)."""
        device = self.images.device
        indices, views = torch.from_numpy(chosen), torch.from_numpy(shown)
        here = indices.to(device, non_blocking=True)
        images = self.policy.render(self.images[here], indices, views)
        mixture = None
        if self.mixup:
            images, mixture = self._mix(images, indices, views, self.mixup.rows(indices, views))
        return Batch(images, self.labels[here], here, views.to(device, non_blocking=True), mixture)

    def _mix(
        self, images: Tensor, indices: Tensor, views: Tensor, drawn: NDArray[np.float64]
    ) -> tuple[Tensor, Mixture]:
        subset = self.plan.indices
        partners = torch.from_numpy(subset[np.minimum(drawn[:, 0] * len(subset), len(subset) - 1).astype(np.int64)])
        there = partners.to(images.device, non_blocking=True)
        others = self.policy.render(self.images[there], partners, views)
        coefficient = torch.from_numpy(drawn[:, 1].astype(np.float32)).to(images.device, non_blocking=True)
        return mix(images, others, coefficient), Mixture(self.labels[there], coefficient)


@dataclass(frozen=True)
class EvaluationSet:
    """Images to evaluate on: uint8 (N, H, W, 3), labels int64 (N,), on one device; each is seen exactly once.

    Process `rank` of `world_size` gets its part, of n consecutive ones.
    """

    images: Tensor
    labels: Tensor
    batch_size: int = 256

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        first, last = (len(self.labels) * k // world_size for k in (rank, rank + 1))
        for start in range(first, last, self.batch_size):
            stop = min(start + self.batch_size, last)
            yield self.images[start:stop], self.labels[start:stop]
