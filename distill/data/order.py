"""The order of an epoch: which images each step trains on, and in which of their views."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.data.draws import permutation, raw_draws
from distill.data.views import Views
from distill.errors import UserError


class Selection(NamedTuple):
    """Images, by their numbers int64 (B,), and the view int64 (B,) that `epoch` shows of each."""

    indices: NDArray[np.int64]
    views: NDArray[np.int64]
    epoch: int = 0


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
        """Returns each row with views below `half` and from it on in turn, the half of its first view first."""
        upper = table >= half
        parts = np.take_along_axis(table, np.argsort(upper, axis=1, kind="stable"), axis=1)
        lower, higher, first = parts[:, :half], parts[:, half:], upper[:, :1]
        mixed = np.empty_like(table)
        mixed[:, 0::2], mixed[:, 1::2] = np.where(first, higher, lower), np.where(first, lower, higher)
        return mixed

    def view_index(self, epoch: int) -> int:
        """Returns e mod K: epochs of one view index show every image in the same view."""
        return epoch % self.view_count if self.view_count else epoch

    def views(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the views (B,) that `epoch` shows of the images `indices` (B,)."""
        view_index = self.view_index(epoch)
        if self._table is None:
            return np.full(len(indices), view_index, dtype=np.int64)
        return self._table[indices, view_index].astype(np.int64)


@dataclass(frozen=True)
class EpochPlan:
    """The order of every epoch: which images, in which views, step by step. Every data set has one.

    `indices` are the images that are trained on (a subset when a validation part is held out). An epoch drops its last
    partial batch. Process `rank` of `world_size` gets its equal part of each batch; the order is that of one process.
    Raises UserError if the processes and the micro-batches do not divide the batch.
    """

    indices: NDArray[np.int64]
    order: ViewOrder
    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1  # micro-batches in which a process computes its images of a batch

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulate):
            parts = f" times {self.accumulate} parts of --accumulate" if self.accumulate > 1 else ""
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of the {self.world_size} processes{parts}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The whole batches of an epoch."""
        return len(self.indices) // self.batch_size

    @property
    def images_per_step(self) -> int:
        """The images of a batch that this process gets."""
        return self.batch_size // self.world_size

    def select(self, epoch: int, indices: NDArray[np.int64]) -> Selection:
        """Returns the images `indices` (B,) in the views that `epoch` shows."""
        return Selection(indices, self.order.views(epoch, indices), epoch)

    def shuffle(self, epoch: int, first_step: int = 0) -> tuple[Iterator[Selection], Selection]:
        """Returns the steps of `epoch` from `first_step` on, and what it drops: of each this process's part."""
        shuffled = self.indices[permutation(self.seed, "image order", epoch, len(self.indices))]
        count = self.steps_per_epoch * self.batch_size
        dropped = shuffled[count:][self.rank :: self.world_size]
        batches = shuffled[:count].reshape(self.steps_per_epoch, self.world_size, self.images_per_step)
        steps = (self.select(epoch, indices) for indices in batches[first_step:, self.rank])
        return steps, self.select(epoch, dropped)


def split_validation(image_count: int, held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns (training indices, validation indices), each ascending.

    The split is the same for every seed and network, so that a teacher can be trained on images that no student of it
    validates on.
    """
    order = permutation(0, "validation split", 0, image_count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def smaller_batch(batch_size: int, lr: float, images: int) -> str:
    """Returns `; try --batch-size 16 --lr 0.0125`: at least four steps an epoch of `images`, and lr in proportion.

    Nothing where there are too few images for that.
    """
    size = 2 ** max((max(images, 0) // 4).bit_length() - 1, 0)
    return f"; try --batch-size {size} --lr {lr * size / batch_size:.3g}" if size > 1 else ""
