"""The cached teacher: gives batches their teacher logits, from a store where that has them, else by a forward pass."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config.recipe import Options, Recipe
from distill.data.datasets import Batch, Images, TrainingData
from distill.losses.top_k import TopKLogits
from distill.parallel.processes import gather
from distill.run.directory import CHECKPOINTS
from distill.teacher.ensemble import Ensemble, mean_logits
from distill.teacher.store import Encoding, LogitStore, fits, store_key
from distill.teacher.teacher import Teacher

STORES = CHECKPOINTS / "stores"
FLUSH_SECONDS = 60.0  # what a kill costs at most of the teacher's work


@dataclass
class LogitCache:
    """A teacher, the store of its logits, None where nothing is kept, and how often each was used by this process."""

    teacher: Teacher
    store: LogitStore | None
    encoding: Encoding
    title: str = ""  # what a line calls it, among several
    misses: int = 0  # views that were computed
    hits: int = 0  # views that were in the store

    def verify(self, data: TrainingData, count: int) -> tuple[int, int, float]:
        """Computes a random sample of what is stored again, and compares.

        Returns the views compared, how many are the same bits, and the largest difference of a logit, relative to the
        largest logit beside it, or to 1.
        """
        assert self.store
        generator, compared, equal, largest = np.random.default_rng(0), 0, 0, 0.0
        view_count, logits = data.plan.order.view_count, slice(0, self.encoding.top_k or None)
        found = self.store.coverage().items()
        view_indices = [k for k, images in found if images and (view_count is None or k < view_count)]
        for view_index in view_indices:
            rows, present = self.store.read(view_index)
            stored = np.flatnonzero(present)
            size = min(len(stored), -(-count // len(view_indices)))
            indices = np.sort(generator.choice(stored, size, replace=False))
            (batch,) = data.render([data.plan.select(view_index, indices)])
            again = self.encoding.encode(self.teacher.logits(batch.images), batch.labels)
            before = rows[batch.indices][:, logits].float()
            difference = (again[:, logits].cpu().float() - before).abs().amax(1)
            compared, equal = compared + len(indices), equal + int((difference == 0).sum())
            largest = max(largest, float((difference / before.abs().amax(1).clamp(min=1)).max()))
        return compared, equal, largest


class CachedEpoch:
    """A teacher's logits of one view index: rows on the data's device, and on the CPU which images have one."""

    def __init__(self, cache: LogitCache, view_index: int, device: torch.device) -> None:
        self._cache, self._store, self._view_index = cache, cache.store, view_index
        self._new: list[NDArray[np.int64]] = []  # images whose rows are not in the store yet
        self._flushed = time.monotonic()
        if self._store:
            rows, self._present = self._store.read(view_index)
            self._rows = rows.to(device)

    def missing(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which of the images (B,) the store lacks; without a store none."""
        return ~self._present[indices] if self._store else np.zeros(len(indices), dtype=bool)

    def logits(self, group: Sequence[Batch]) -> list[Tensor | TopKLogits]:
        """Returns the logits of each batch; those that are not there are computed together, so that blocks are full."""
        sizes, decode = [len(batch.labels) for batch in group], self._cache.encoding.decode
        if not self._store:
            rows = self._forward([batch.images for batch in group], [batch.labels for batch in group])
            return [decode(part) for part in torch.split(rows, sizes)]
        missing = [np.flatnonzero(self.missing(batch.indices.numpy())) for batch in group]
        self._cache.hits += sum(sizes) - sum(map(len, missing))
        parts = [(batch, rows) for batch, rows in zip(group, missing, strict=True) if len(rows)]
        if parts:
            images = [_rows(batch.images, rows) for batch, rows in parts]
            labels = [_rows(batch.labels, rows) for batch, rows in parts]
            indices = np.concatenate([batch.indices.numpy()[rows] for batch, rows in parts])
            self._add(indices, self._forward(images, labels))
        return [decode(self._rows[batch.indices.to(self._rows.device, non_blocking=True)]) for batch in group]

    def _forward(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Returns the encoded logits of all images, of one batch or several."""
        logits = self._cache.teacher.logits(_joined(images))
        self._cache.misses += len(logits)
        return self._cache.encoding.encode(logits, _joined(labels))

    def _add(self, indices: NDArray[np.int64], rows: Tensor) -> None:
        places = torch.from_numpy(indices).to(rows.device, non_blocking=True)
        # as integers: with --deterministic CUDA multiplies by 1, which changes NaNs, and rows of top-k have some
        self._rows.view(torch.int16)[places] = rows.view(torch.int16)
        self._present[indices] = True
        self._new.append(indices)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is new to the store."""
        if self._store and self._new:
            indices = np.concatenate(self._new)
            rows = self._rows[torch.from_numpy(indices).to(self._rows.device)]
            self._store.write(self._view_index, indices, rows)
        self._new, self._flushed = [], time.monotonic()


def _rows(values: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return values if len(rows) == len(values) else values[torch.from_numpy(rows).to(values.device, non_blocking=True)]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


class CachedTeacher:
    """Gives each batch of the training data its teacher logits; of several teachers their mean (ensemble.py).

    What the stores lack is computed ahead of the step, as many batches at a time as fill a block of the teacher. Each
    process computes its own part of the epoch, so that nothing is computed twice. The stores get the images that the
    epoch drops as well: another seed shows them one by one, each time for the price of a block.
    """

    def __init__(
        self, data: TrainingData, caches: Sequence[LogitCache], ensemble: str = "logits", temperature: float = 1.0
    ) -> None:
        self.data, self.caches, self.ensemble, self.temperature = data, caches, ensemble, temperature
        self._at_once = max(cache.teacher.at_once for cache in caches)  # images
        self._ahead = max(1, self._at_once // data.plan.images_per_step)  # batches

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of `epoch` from `first_step` on, with their teacher logits."""
        steps, dropped = self.data.plan.shuffle(epoch, first_step)
        with self._opened(self.data.plan.order.view_index(epoch)) as members:
            lacking = [member for member in members if member.missing(dropped.indices).any()]
            for batch in self.data.render([dropped] if lacking else []):
                for member in lacking:
                    member.logits([batch])
            stream = self.data.render(steps)
            while group := list(islice(stream, self._ahead)):
                for batch, *logits in zip(group, *(member.logits(group) for member in members), strict=True):
                    yield replace(batch, teacher_logits=self._mean(logits))

    def _mean(self, logits: Sequence[Tensor | TopKLogits]) -> Tensor | TopKLogits:
        if len(logits) == 1:
            return logits[0]
        return mean_logits(cast("Sequence[Tensor]", logits), self.ensemble, self.temperature)  # --top-k takes one

    def fill(self, view_index: int) -> Iterator[int]:
        """Computes what the stores lack of `view_index` for all training images. Yields how many are done, in parts."""
        indices, size = self.data.plan.indices, self._at_once
        with self._opened(view_index) as members:
            missing = indices[np.logical_or.reduce([member.missing(indices) for member in members])]
            yield len(indices) - len(missing)
            blocks = (missing[start : start + size] for start in range(0, len(missing), size))
            for batch in self.data.render(self.data.plan.select(view_index, block) for block in blocks):
                for member in members:
                    member.logits([batch])
                yield len(batch.labels)

    @contextmanager
    def _opened(self, view_index: int) -> Iterator[list[CachedEpoch]]:
        members = [CachedEpoch(cache, view_index, self.data.device) for cache in self.caches]
        try:
            yield members
        finally:
            for member in members:
                member.flush()

    def print_statistics(self) -> None:
        """Prints how many views each teacher has computed, in all processes, and how many its store had."""
        for cache in self.caches:
            misses, hits = map(sum, zip(*gather((cache.misses, cache.hits)), strict=True))
            stored = f"{hits:,} were in the store" if cache.store else "no store"
            print(f"teacher{cache.title}: {misses:,} views computed, {stored}")


def cache_teachers(
    recipe: Recipe, options: Options, data: Images, training: TrainingData, teachers: Ensemble
) -> CachedTeacher | None:
    """Returns the cached teacher of `training`, None where the method has no use for logits.

    Each of `teachers` has a store, unless that is turned off or would be too large.
    """
    if not recipe.uses_teacher_logits:
        return None
    members = list(zip(teachers.archs, teachers.members, strict=True))
    caches = [_open_cache(recipe, options, data, training, arch, teacher) for arch, teacher in members]
    if len(members) > 1:
        caches = [replace(cache, title=f" {arch}") for cache, arch in zip(caches, teachers.archs, strict=True)]
    return CachedTeacher(training, caches, recipe.ensemble, recipe.temperature)


def _open_cache(
    recipe: Recipe, options: Options, data: Images, training: TrainingData, arch: str, teacher: Teacher
) -> LogitCache:
    encoding = Encoding(len(data.classes), recipe.top_k)
    if not options.store:
        return LogitCache(teacher, None, encoding)
    views = min(recipe.epochs, training.plan.order.view_count or recipe.epochs)
    key = store_key(
        training,
        teacher,
        teacher_arch=arch,
        name=data.name,
        digest=data.digest,
        classes=len(data.classes),
        view_seed=recipe.view_seed,
        top_k=recipe.top_k,
    )
    store = LogitStore(STORES, key)
    even = training.policy.alternating
    fit, line = fits(views, training.image_count, encoding, options.store_limit, STORES, store.tidy(), even=even)
    print(f"store: {store.path}, {line}" if fit else f"store: off: {line}")
    return LogitCache(teacher, store if fit else None, encoding)
