"""Training data with a teacher's answers, from its store where that has them."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.config.recipe import Options, Recipe
from distill.data.datasets import Batch, Images, ViewedData
from distill.parallel.processes import gather
from distill.run.directory import CHECKPOINTS
from distill.teacher.ensemble import Ensemble, add_to_mean
from distill.teacher.store import Column, Encoding, LogitStore, fits, store_key
from distill.teacher.teacher import Teacher

STORES = CHECKPOINTS / "stores"
FLUSH_SECONDS = 60.0  # what a kill costs at most of the teacher's work


def cache_teachers(
    recipe: Recipe, options: Options, data: Images, training: ViewedData, teachers: Ensemble
) -> "AnsweredData":
    """The training data with the mean of the teachers' answers, each from its store unless that is turned off or would
    be too large.
    """
    found: Any = training
    for number, (arch, teacher) in enumerate(zip(teachers.archs, teachers.members, strict=True), start=1):
        title = f" {arch}" if len(teachers.archs) > 1 else ""
        store, encoding = _open_store(recipe, options, data, training, arch, teacher)
        found = AnsweredData(found, teacher, store, encoding, Part(number, recipe.ensemble, recipe.temperature, title))
    assert isinstance(found, AnsweredData)
    return found


def _open_store(
    recipe: Recipe, options: Options, data: Images, training: ViewedData, arch: str, teacher: Teacher
) -> tuple[LogitStore | None, Encoding]:
    """The store of one teacher, None where it has none, and how answers are kept in it."""
    encoding = Encoding(len(data.classes), recipe.top_k)
    if not options.store:
        return None, encoding
    slots = min(recipe.epochs, training.plan.order.view_count or recipe.epochs)
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
    present = sum(path.stat().st_size for path in store.path.glob("*.pt"))
    fit, line = fits(slots, training.image_count, encoding, options.store_limit, STORES, present)
    if not fit:
        print(f"store: off: {line}")
        return None, encoding
    print(f"store: {store.path}, {line}")
    return store, encoding


def tell(data: object) -> None:
    """Print how much the teacher has worked for `data` in this call, in all processes, if it was asked at all."""
    if isinstance(data, AnsweredData):
        tell(data.data)  # of several teachers those before
        answered, known = map(sum, zip(*gather((data.answered, data.known)), strict=True))
        kept = f"{known:,} were in the store" if data.store else "no store"
        print(f"teacher{data.part.title}: {answered:,} views answered, {kept}")


class Part(NamedTuple):
    """A teacher's place among several: its number, from 1, how their answers become one (ensemble.py), and what it is
    called in a line.
    """

    number: int = 1
    how: str = "logits"
    temperature: float = 1.0
    title: str = ""

    def join(self, before: Any, logits: Any) -> Any:
        """The mean of all teachers' logits up to this one, from that of those before."""
        if self.number == 1:
            return logits
        return add_to_mean(before, logits, self.number, self.how, self.temperature)


class AnsweredData:
    """Training data whose batches bring the teacher's logits along, from the store where it has them.

    What it has not is answered ahead of the step, as many batches at a time as fill a block of the teacher, and
    stored. Each process answers its own share of the epoch, so that none is answered twice. For the store also the
    images that the epoch leaves out: another seed shows them one by one, each time for the price of a block.
    It is data that a further teacher can answer: then its batches bring the mean of both.
    """

    def __init__(
        self,
        data: ViewedData,
        teacher: Teacher,
        store: LogitStore | None,
        encoding: Encoding,
        part: Part = Part(),  # noqa: B008 it cannot change
    ) -> None:
        self.data, self.teacher, self.store, self.encoding, self.part = data, teacher, store, encoding, part
        self.steps_per_epoch, self.labelled, self.from_files = data.steps_per_epoch, data.labelled, data.from_files
        self.plan, self.policy, self.mixup, self.show = data.plan, data.policy, data.mixup, data.show
        self.image_count, self.device = data.image_count, data.device
        own = data.plan.batch_size // data.plan.world_size
        self._ahead = max(1, teacher.at_once // own)  # batches
        self.answered, self.known = 0, 0  # views of this process: that the teacher has answered, that it had before

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        slot = self.data.plan.order.slot(epoch)
        column = self.store.column(slot, self.data.device) if self.store else None
        chosen = (indices for indices, _ in self.data.plan.steps(epoch, first_step))
        fresh: list[NDArray[np.int64]] = []
        flushed = time.monotonic()
        try:
            left_out, views = self.data.plan.left_out(epoch)
            if column and not column.answered[left_out].all():
                for batch in self.data.show(iter([(left_out, views)])):
                    list(self._answer([(batch, left_out)], column, fresh))
            for group in _grouped(zip(self.data.batches(epoch, first_step), chosen, strict=True), self._ahead):
                for batch, logits in self._answer(group, column, fresh):
                    yield replace(batch, teacher_logits=self.part.join(batch.teacher_logits, logits))
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    self._flush(slot, column, fresh)
                    flushed = time.monotonic()
        finally:
            self._flush(slot, column, fresh)

    def fill(self, slot: int) -> Iterator[int]:
        """Answer what the store lacks of `slot` for all training images. Yields how many were known or are done now."""
        assert self.store
        indices = self.data.plan.indices
        column = self.store.column(slot, self.data.device)
        missing = indices[~column.answered[indices]]
        yield len(indices) - len(missing)
        fresh: list[NDArray[np.int64]] = []
        flushed = time.monotonic()
        try:
            size = self.teacher.at_once
            blocks = [missing[start : start + size] for start in range(0, len(missing), size)]
            shown = (self.data.plan.order.shown(slot, chosen) for chosen in blocks)
            for chosen, batch in zip(blocks, self.data.show(zip(blocks, shown, strict=True)), strict=True):
                list(self._answer([(batch, chosen)], column, fresh))
                yield len(chosen)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    self._flush(slot, column, fresh)
                    flushed = time.monotonic()
        finally:
            self._flush(slot, column, fresh)

    def verify(self, count: int) -> tuple[int, int, float]:
        """Ask the teacher again for a random sample of what is stored: (answers compared, how many are the same bits,
        largest difference of a logit, as a share of the largest logit beside it, or of 1).
        """
        assert self.store
        chance, compared, equal, largest = np.random.default_rng(0), 0, 0, 0.0
        count_of_views = self.data.plan.order.view_count
        slots = [slot for slot in self.store.coverage() if count_of_views is None or slot < count_of_views]
        for slot in slots:
            column = self.store.column(slot, self.data.device)
            known = np.flatnonzero(column.answered)
            chosen = np.sort(chance.choice(known, min(len(known), -(-count // len(slots))), replace=False))
            batch = next(self.data.show(iter([(chosen, self.data.plan.order.shown(slot, chosen))])))
            again = self.encoding.encode(self.teacher.logits(batch.images), batch.labels)
            stored, logits = column.rows[batch.indices], slice(0, self.encoding.top_k or None)
            before = stored[:, logits].float()
            difference = (again[:, logits].float() - before).abs().amax(1)
            compared, equal = compared + len(chosen), equal + int((difference == 0).sum())
            largest = max(largest, float((difference / before.abs().amax(1).clamp(min=1)).max()))
        return compared, equal, largest

    def _answer(
        self, group: list[tuple[Batch, NDArray[np.int64]]], column: Column | None, fresh: list[NDArray[np.int64]]
    ) -> Iterator[tuple[Batch, Any]]:
        """Each batch of `group` with its logits. New answers go into `column`, their images' numbers to `fresh`."""
        if column is None:
            rows = self._ask([batch for batch, _ in group])
            ends = np.cumsum([len(indices) for _, indices in group])
            for (batch, indices), end in zip(group, ends, strict=True):
                yield batch, self.encoding.decode(rows[end - len(indices) : end])
            return
        unknown = [np.flatnonzero(~column.answered[indices]) for _, indices in group]
        self.known += sum(len(indices) for _, indices in group) - sum(map(len, unknown))
        if any(map(len, unknown)):
            pairs = list(zip(group, unknown, strict=True))
            indices = np.concatenate([indices[rows] for (_, indices), rows in pairs])
            parts = [_rows(batch, torch.from_numpy(rows)) for (batch, _), rows in pairs]
            there = torch.from_numpy(indices).to(column.rows.device, non_blocking=True)
            # as integers: with --deterministic CUDA multiplies by 1, which changes NaNs, and rows of top-k have some
            column.rows.view(torch.int16)[there] = self._ask(parts).view(torch.int16)
            column.answered[indices] = True
            fresh.append(indices)
        for batch, _ in group:
            yield batch, self.encoding.decode(column.rows[batch.indices])

    def _ask(self, batches: list[Batch]) -> Tensor:
        """The teacher's answers to all of them, encoded."""
        answers = self.teacher.logits(torch.cat([batch.images for batch in batches]))
        self.answered += len(answers)
        return self.encoding.encode(answers, torch.cat([batch.labels for batch in batches]))

    def _flush(self, slot: int, column: Column | None, fresh: list[NDArray[np.int64]]) -> None:
        if self.store and column and fresh:
            indices = np.concatenate(fresh)
            fresh.clear()
            self.store.write(slot, indices, column.rows[torch.from_numpy(indices).to(column.rows.device)])


def _rows(batch: Batch, chosen: Tensor) -> Batch:
    """Images and labels of some rows of a batch."""
    there = chosen.to(batch.images.device, non_blocking=True)
    return replace(batch, images=batch.images[there], labels=batch.labels[there])


def _grouped(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
