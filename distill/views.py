"""Random numbers by counter, the view that an epoch shows, and the interface of a view policy.

What a network sees of image i is its view v: a pure function of the image and (policy, view seed, i, v). Which view
an epoch shows, and in which order the images come, are pure functions too. So a run can be cut anywhere, and teacher
and student see the same pixels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import UserError


# ------------------------------------------------------------------------------------------------- numbers by counter
def raw_draws(seed: int, purpose: str, counter: int, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit integers that depend on (seed, purpose, counter) alone; a longer draw starts the same.

    Philox's raw stream is the same in every version of numpy and on every machine, which numpy does not promise of
    its distributions.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{counter}".encode()).digest()[:16]
    words = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=words).random_raw(count).astype(np.uint64)


def uniforms(seed: int, purpose: str, counter: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), 53 bits each, in C order: row i is the same for any number of rows."""
    draws = raw_draws(seed, purpose, counter, int(np.prod(shape)))
    return (draws >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def uniforms_of(seed: int, purpose: str, counter: int, row: int, columns: int) -> NDArray[np.float64]:
    """Row `row` of uniforms(seed, purpose, counter, (any, columns)), without those before it; columns: a multiple of 4,
    the numbers that Philox makes at each count."""
    assert columns % 4 == 0
    key = hashlib.sha256(f"{seed}/{purpose}/{counter}".encode()).digest()[:16]
    words = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    draws = np.random.Philox(key=words, counter=row * (columns // 4)).random_raw(columns).astype(np.uint64)
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: str, counter: int, count: int) -> NDArray[np.int64]:
    """A random order of 0 .. count-1: the order that sorts raw draws."""
    return np.argsort(raw_draws(seed, purpose, counter, count), kind="stable")


class Images(Protocol):
    """What runs and stores have to know of the images they are about: they are told apart by `digest`; `name` is for
    people."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def counts(self) -> str: ...


# -------------------------------------------------------------------------------------------------------------- views
class Views(Protocol):
    """How view v of image i looks, as far as the order of the views and the key of a store have to know."""

    @property
    def name(self) -> str:
        """The policy and all its parameters: policies of one name show the same."""
        ...

    @property
    def view_count(self) -> int | None:
        """Distinct views of an image; None where parameters are continuous."""
        ...

    @property
    def alternating(self) -> bool:
        """Whether the first half of the views and the second take turns from epoch to epoch."""
        ...


class ViewPolicy(Views, Protocol):
    """A policy for small images, that works on whole batches. Implementations: cifar10/augment.py."""

    def render(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """images: uint8 (B, H, W, 3) on any device, indices, views: int64 (B,) on the CPU, where parameters are drawn
        without waiting for a device -> uint8 (B, H, W, 3) on the images' device, row by row independent."""
        ...


class ViewOrder:
    """Which view of image i epoch e shows: perm_i[e mod K], perm_i a permutation of the image's own.

    Numbered views: perm_i orders all of them, and K of them (the first in that order) are cycled through, so that
    runs with different K show the same views as far as they go. Continuous policies: view e mod K for every image, as
    the parameters of its views are independent draws already; without K each epoch shows a new one.

    Where the two halves of the views alternate, perm_i takes them in turn, each half in a random order and a random one
    of them first: of two epochs in a row one shows the image flipped (Jordan 2024, arXiv:2404.00498).
    """

    def __init__(self, policy: Views, view_seed: int, image_count: int, views: int | None) -> None:
        self.view_count = views or policy.view_count
        self._table: NDArray[np.uint8] | None = None
        if policy.view_count and policy.view_count > 1:
            table = self._permutations(view_seed, image_count, policy.view_count)
            table = self._alternating(table, policy.view_count // 2) if policy.alternating else table
            self._table = table[:, : self.view_count]

    @staticmethod
    def _permutations(view_seed: int, image_count: int, view_count: int) -> NDArray[np.uint8]:
        assert view_count <= 256
        table = np.empty((image_count, view_count), dtype=np.uint8)
        rows = 8192  # a block of images at a time: the draws of all of them would take 65 MB for CIFAR-10
        for block, start in enumerate(range(0, image_count, rows)):
            draws = raw_draws(view_seed, "view order", block, rows * view_count).reshape(rows, view_count)
            table[start : start + rows] = np.argsort(draws, axis=1, kind="stable")[: image_count - start]
        return table

    @staticmethod
    def _alternating(table: NDArray[np.uint8], half: int) -> NDArray[np.uint8]:
        """Each row with views below `half` and from it on in turn, the half of its first view first."""
        upper = table >= half
        parts = np.take_along_axis(table, np.argsort(upper, axis=1, kind="stable"), axis=1)
        lower, higher, first = parts[:, :half], parts[:, half:], upper[:, :1]
        mixed = np.empty_like(table)
        mixed[:, 0::2], mixed[:, 1::2] = np.where(first, higher, lower), np.where(first, lower, higher)
        return mixed

    def slot(self, epoch: int) -> int:
        """e mod K: epochs of one slot show every image in the same view."""
        return epoch % self.view_count if self.view_count else epoch

    def shown(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The views (B,) that `epoch` shows of the images `indices` (B,)."""
        slot = self.slot(epoch)
        if self._table is None:
            return np.full(len(indices), slot, dtype=np.int64)
        return self._table[indices, slot].astype(np.int64)


# ------------------------------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Mixture:
    """What the images of a batch are mixed with: the partners' labels int64 (B,), and the share float32 (B,) in [0, 1]
    that each image has of its own."""

    labels: Tensor
    share: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's input. images: uint8 (B, H, W, 3), the rest int64 (B,); `indices` count in the whole training set.
    teacher_logits: float32 (B, C) where a teacher takes part, or what is kept of them, kd_loss.TopKLogits. epoch: from
    0, for losses whose weight depends on it."""

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

        mixture = Mixture(self.mixture.labels[rows], self.mixture.share[rows]) if self.mixture else None
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

    def batches(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (B, H, W, 3) and labels (B,); (r, n) yields the r-th of n consecutive parts, and each image is
        in one of them."""
        ...


@dataclass(frozen=True)
class EpochPlan:
    """The order of an epoch: which images, in which views, step by step. Shared by every data set.

    `indices`: the images that are trained on (a subset when a validation part is held out). The last partial batch
    of an epoch is dropped. `share`: (r, n) yields the r-th of n equal parts of each batch, for process r of n; the
    order is that of one process. Raises UserError if n does not divide the batch.
    """

    indices: NDArray[np.int64]
    order: ViewOrder
    seed: int
    batch_size: int
    share: tuple[int, int] = (0, 1)
    accumulate: int = 1  # parts that a process computes its own images of a batch in

    def __post_init__(self) -> None:
        if self.batch_size % (self.share[1] * self.accumulate):
            parts = f" times {self.accumulate} parts of --accumulate" if self.accumulate > 1 else ""
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of the {self.share[1]} processes{parts}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.indices) // self.batch_size

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(indices, views), both (batch_size / n,), for each step of `epoch` from `first_step` on."""
        shuffled, (part, parts) = self._shuffled(epoch), self.share
        size = self.batch_size // parts
        for step in range(first_step, self.steps_per_epoch):
            start = step * self.batch_size + part * size
            chosen = shuffled[start : start + size]
            yield chosen, self.order.shown(epoch, chosen)

    def left_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(indices, views) of what `epoch` drops, fewer than a batch; for each process a part of them."""
        part, parts = self.share
        chosen = self._shuffled(epoch)[self.steps_per_epoch * self.batch_size :][part::parts]
        return chosen, self.order.shown(epoch, chosen)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return self.indices[permutation(self.seed, "image order", epoch, len(self.indices))]


def check_cutout(cutout: int, side: int) -> None:
    """Raises UserError where a square of `cutout` pixels, wherever its centre lies, covers an image of `side` pixels.

    Its first row is at most side - 1 - cutout // 2, and its last one at least cutout - 1 - cutout // 2.
    """
    if cutout >= 2 * side - 1:
        raise UserError(f"--cutout {cutout} blots out every image of {side} pixels: it takes {2 * side - 2} at most")


def split_validation(image_count: int, held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training indices, validation indices), each ascending. The same split for every seed and network, so that a
    teacher can be trained on images that no student of it validates on."""
    order = permutation(0, "validation split", 0, image_count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class ViewDraws:
    """`columns` uniform numbers for each (view seed, purpose, i, v), drawn view by view for all images at once."""

    def __init__(self, view_seed: int, purpose: str, columns: int) -> None:
        self._view_seed, self._purpose, self._columns = view_seed, purpose, columns
        self._table = lru_cache(maxsize=256)(self._draw)  # an epoch of numbered views shows all of them

    def _draw(self, view: int, image_count: int) -> NDArray[np.float32]:
        return uniforms(self._view_seed, self._purpose, view, (image_count, self._columns)).astype(np.float32)

    def rows(self, indices: Tensor, views: Tensor) -> NDArray[np.float64]:
        """(B, columns) in [0, 1]; the numbers of image i stand in row i of a table, however many rows are drawn."""
        chosen, shown = indices.numpy(), views.numpy()
        found = np.empty((len(chosen), self._columns))
        image_count = 1 << int(chosen.max()).bit_length()  # a power of two, so that few tables are drawn
        for view in np.unique(shown):
            where = shown == view
            found[where] = self._table(int(view), image_count)[chosen[where]]
        return found


def mix(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """share * images + (1 - share) * others, rounded to uint8; images, others: uint8 (B, H, W, 3), share: (B,)."""
    weight = share.view(-1, 1, 1, 1)
    return (weight * images + (1 - weight) * others).round().to(torch.uint8)


class TensorData:
    """Training data that lies in memory as one tensor, on the CPU or a GPU; views are rendered where it lies.

    `mixup` (Zhang et al. 2017, arXiv:1710.09412, with Beta(1, 1)) is part of the view: image i in view v is mixed with
    the same view of a partner, u * own + (1 - u) * partner, rounded to uint8. Partner and share u, uniform in [0, 1),
    are drawn for (view seed, i, v) from the whole training subset, so that nothing depends on the batch.
    """

    from_files = False

    def __init__(
        self, images: Tensor, labels: Tensor, plan: EpochPlan, policy: ViewPolicy, mixup: ViewDraws | None = None
    ) -> None:
        """images: uint8 (N, H, W, 3), labels: int64 (N,), on one device, negative where there are none; mixup: draws of
        two columns."""
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
        share = torch.from_numpy(drawn[:, 1].astype(np.float32)).to(images.device, non_blocking=True)
        return mix(images, others, share), Mixture(self.labels[there], share)


@dataclass(frozen=True)
class EvaluationSet:
    """Images to evaluate on: uint8 (N, H, W, 3), labels int64 (N,), on one device; each is seen exactly once.

    `share`: (r, n) yields the r-th of n consecutive parts, for process r of n.
    """

    images: Tensor
    labels: Tensor
    batch_size: int = 256

    def batches(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        part, parts = share
        first, last = (len(self.labels) * k // parts for k in (part, part + 1))
        for start in range(first, last, self.batch_size):
            stop = min(start + self.batch_size, last)
            yield self.images[start:stop], self.labels[start:stop]
