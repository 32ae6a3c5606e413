"""Random numbers by counter: each depends on a seed, a purpose and a counter alone, never on a process or a batch."""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def raw_draws(seed: int, purpose: str, counter: int, count: int) -> NDArray[np.uint64]:
    """Returns `count` random 64-bit integers that depend on (seed, purpose, counter) alone.

    A longer draw starts the same. Philox's raw stream is the same in every version of numpy and on every machine, which
    numpy does not promise of its distributions.
    """
    key = hashlib.sha256(f"{seed}/{purpose}/{counter}".encode()).digest()[:16]
    words = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=words).random_raw(count).astype(np.uint64)


def uniforms(seed: int, purpose: str, counter: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Returns uniform numbers in [0, 1), 53 bits each, in C order: row i is the same for any number of rows."""
    draws = raw_draws(seed, purpose, counter, int(np.prod(shape)))
    return (draws >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def uniforms_of(seed: int, purpose: str, counter: int, row: int, columns: int) -> NDArray[np.float64]:
    """Returns row `row` of uniforms(seed, purpose, counter, (any, columns)), without drawing those before it.

    columns: a multiple of 4, the numbers that Philox makes at each count.
    """
    assert columns % 4 == 0
    key = hashlib.sha256(f"{seed}/{purpose}/{counter}".encode()).digest()[:16]
    words = np.frombuffer(key, dtype="<u8").astype(np.uint64)
    draws = np.random.Philox(key=words, counter=row * (columns // 4)).random_raw(columns).astype(np.uint64)
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: str, counter: int, count: int) -> NDArray[np.int64]:
    """Returns a random order of 0 .. count-1: the order that sorts raw draws."""
    return np.argsort(raw_draws(seed, purpose, counter, count), kind="stable")


class ViewDraws:
    """`columns` uniform numbers for each (view seed, purpose, i, v), drawn view by view for all images at once."""

    def __init__(self, view_seed: int, purpose: str, columns: int) -> None:
        self._view_seed, self._purpose, self._columns = view_seed, purpose, columns
        self._table = lru_cache(maxsize=256)(self._draw)  # an epoch of numbered views shows all of them

    def _draw(self, view: int, image_count: int) -> NDArray[np.float32]:
        return uniforms(self._view_seed, self._purpose, view, (image_count, self._columns)).astype(np.float32)

    def rows(self, indices: Tensor, views: Tensor) -> NDArray[np.float64]:
        """Returns (B, columns) in [0, 1]: row i of a table is image i's, however many rows are drawn."""
        images, shown = indices.numpy(), views.numpy()
        draws = np.empty((len(images), self._columns))
        image_count = 1 << int(images.max()).bit_length()  # a power of two, so that few tables are drawn
        for view in np.unique(shown):
            where = shown == view
            draws[where] = self._table(int(view), image_count)[images[where]]
        return draws
