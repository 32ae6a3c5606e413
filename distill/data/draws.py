"""Random numbers by counter: each depends on a seed, a purpose and a counter alone, never on a process or a batch."""

import hashlib

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IDLE = 1000  # batches without a use for a table, after which it is dropped


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
        self._tables: dict[tuple[int, int], NDArray[np.float32]] = {}  # of (view, number of rows)
        self._used: dict[tuple[int, int], int] = {}  # in which call of rows each was used last
        self._calls = 0

    def _table(self, view: int, image_count: int) -> NDArray[np.float32]:
        """Returns the draws of a view, kept as long as batches have use for them.

        An epoch of numbered views shows all of them, one without numbers has a view of its own.
        """
        key = (view, image_count)
        if key not in self._tables:
            for idle in [known for known, call in self._used.items() if self._calls - call > IDLE]:
                del self._tables[idle], self._used[idle]
            drawn = uniforms(self._view_seed, self._purpose, view, (image_count, self._columns))
            self._tables[key] = drawn.astype(np.float32)
        self._used[key] = self._calls
        return self._tables[key]

    def rows(self, indices: Tensor, views: Tensor) -> NDArray[np.float64]:
        """Returns (B, columns) in [0, 1]: row i of a table is image i's, however many rows are drawn."""
        self._calls += 1
        images, shown = indices.numpy(), views.numpy()
        draws = np.empty((len(images), self._columns))
        image_count = 1 << int(images.max()).bit_length()  # a power of two, so that few tables are drawn
        for view in np.unique(shown):
            where = shown == view
            draws[where] = self._table(int(view), image_count)[images[where]]
        return draws
