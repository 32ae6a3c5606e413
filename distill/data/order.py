"""The order of an epoch: which images each step trains on, and in which of their views."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.data.draws import permutation, raw_draws
from distill.data.views import Views
from distill.errors import UserError


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
        """E mod K: epochs of one slot show every image in the same view."""
        return epoch % self.view_count if self.view_count else epoch

    def shown(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The views (B,) that `epoch` shows of the images `indices` (B,)."""
        slot = self.slot(epoch)
        if self._table is None:
            return np.full(len(indices), slot, dtype=np.int64)
        return self._table[indices, slot].astype(np.int64)


@dataclass(frozen=True)
class EpochPlan:
    """The order of an epoch: which images, in which views, step by step. Shared by every data set.

    `indices`: the images that are trained on (a subset when a validation part is held out). The last partial batch
    of an epoch is dropped. Process `rank` of `world_size` gets its part of each batch, of n equal ones; the order is
    that of one process. Raises UserError if n does not divide the batch.
    """

    indices: NDArray[np.int64]
    order: ViewOrder
    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1  # parts that a process computes its own images of a batch in

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulate):
            parts = f" times {self.accumulate} parts of --accumulate" if self.accumulate > 1 else ""
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of the {self.world_size} processes{parts}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.indices) // self.batch_size

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(indices, views), both (batch_size / n,), for each step of `epoch` from `first_step` on."""
        shuffled, size = self._shuffled(epoch), self.batch_size // self.world_size
        for step in range(first_step, self.steps_per_epoch):
            start = step * self.batch_size + self.rank * size
            chosen = shuffled[start : start + size]
            yield chosen, self.order.shown(epoch, chosen)

    def left_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(indices, views) of what `epoch` drops, fewer than a batch; for each process a part of them."""
        chosen = self._shuffled(epoch)[self.steps_per_epoch * self.batch_size :][self.rank :: self.world_size]
        return chosen, self.order.shown(epoch, chosen)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return self.indices[permutation(self.seed, "image order", epoch, len(self.indices))]


def split_validation(image_count: int, held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training indices, validation indices), each ascending. The same split for every seed and network, so that a
    teacher can be trained on images that no student of it validates on.
    """
    order = permutation(0, "validation split", 0, image_count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
