"""The teacher's answers on disk: each view of an image is answered once, for every run that shows it.

A store belongs to one teacher, one set of images and one kind of views; its key says which, in clear text. A run shows
slot s = epoch mod K of every image (views.ViewOrder); the answers to one slot are a column, float16 (images, classes).
A column lies on disk as segments: files that are written once, verified by digest and merged when they are read. So any
number of runs add to one store without a lock, a kill leaves a whole segment or none, and a damaged segment is named,
put aside, and its views are answered again.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import checkpoint
from distill.kd_loss import TEMPERATURES, TopKLogits, top_k_logits
from distill.recipe import UserError
from distill.teacher import Teacher
from distill.views import Batch, ViewedData

FLUSH_SECONDS = 60.0  # what a kill costs at most of the teacher's work
KEY, ASIDE = "key.json", ".damaged"
FORMAT = 1  # of the segments, and of what the views of a policy look like: another number is another store


@dataclass(frozen=True)
class Encoding:
    """How an answer is kept, as a row of float16: its logits, or with `top_k` the bits of a TopKLogits."""

    classes: int
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.top_k and not self.top_k < self.classes < 2**15:
            raise UserError(f"--top-k {self.top_k} must be less than the {self.classes} classes, of 32,767 at most")

    @property
    def width(self) -> int:
        """float16 numbers a row: k values, k classes as int16, the label's logit, four float32."""
        return 2 * self.top_k + 1 + 2 * len(TEMPERATURES) if self.top_k else self.classes

    def encode(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits float32 (B, C) that float16 has, labels (B,) -> float16 (B, width)."""
        if not self.top_k:
            return logits.half()
        kept = top_k_logits(logits, labels, self.top_k)
        classes, rest = kept.classes.to(torch.int16).view(torch.float16), kept.rest.contiguous().view(torch.float16)
        return torch.cat([kept.values.half(), classes, kept.label.half().unsqueeze(1), rest], dim=1)

    def decode(self, rows: Tensor) -> Tensor | TopKLogits:
        """float16 (B, width) -> float32 (B, C), or TopKLogits."""
        if not self.top_k:
            return rows.float()
        sizes = [self.top_k, self.top_k, 1, 2 * len(TEMPERATURES)]
        values, classes, label, rest = torch.split(rows, sizes, dim=1)
        numbers = classes.contiguous().view(torch.int16).long()
        return TopKLogits(values.float(), numbers, label.float().squeeze(1), rest.contiguous().view(torch.float32))


@dataclass
class Column:
    """The answers to one slot: `rows` float16 (N, width), on the data's device, and which of the N are there, on the
    CPU."""

    rows: Tensor
    answered: NDArray[np.bool_]


class LogitStore:
    """The store of `key`, of store_key(), in a directory below `root`."""

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        self.key, self.images = {"format": FORMAT, **key}, key["images"]
        self.encoding = Encoding(key["classes"], key.get("top_k", 0))
        self.digest = checkpoint.digest(self.key)
        self.path = root / f"{key['data']}-{key['teacher']}-{self.digest[:16]}"
        self._writes = True

    def column(self, slot: int, device: torch.device) -> Column:
        """What is known of `slot`, from all segments of it."""
        rows = torch.zeros(self.images, self.encoding.width, dtype=torch.float16)
        answered = np.zeros(self.images, dtype=bool)
        for path in sorted(self.path.glob(f"{slot:05d}-*.pt")):
            try:
                which, found = self._read(path, slot)
            except checkpoint.CheckpointError as error:
                if path.exists():  # else another process has put it aside or removed it
                    print(f"{error}; its views are answered again")
                    with suppress(OSError):
                        path.rename(path.with_name(path.name + ASIDE))
                continue
            rows[torch.from_numpy(which)] = found
            answered |= which
        return Column(rows.to(device), answered)

    def _read(self, path: Path, slot: int) -> tuple[NDArray[np.bool_], Tensor]:
        """Which of the images a segment answers, bool (N,), and their rows (n, width). Raises CheckpointError."""
        segment = checkpoint.load(path)
        try:
            bits, rows = segment["which"], segment["rows"]
            whole = segment["key"] == self.digest and segment["slot"] == slot
            whole &= bits.dtype == torch.uint8 and bits.shape == (-(-self.images // 8),)
            which = np.unpackbits(bits.numpy(), count=self.images).astype(bool)
            whole &= rows.dtype == torch.float16 and rows.shape == (int(which.sum()), self.encoding.width)
        except (KeyError, AttributeError, TypeError, ValueError):
            whole = False
        if not whole:
            raise checkpoint.CheckpointError(f"{path} is no segment of this store")
        return which, rows

    def write(self, slot: int, indices: NDArray[np.int64], rows: Tensor) -> None:
        """Add a segment: rows (n, width) of the images `indices` (n,); on disk in ascending order, and a bit an image.

        Where it cannot be written the store is only read from then on, with one line that says so: answers that are
        lost cost time, not the run.
        """
        if not self._writes or not len(indices):
            return
        which = np.zeros(self.images, dtype=bool)
        which[indices] = True
        ascending = torch.from_numpy(np.argsort(indices)).to(rows.device)
        segment: dict[str, Any] = {"key": self.digest, "slot": slot, "which": torch.from_numpy(np.packbits(which))}
        segment["rows"] = rows[ascending].cpu()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / KEY).exists():
                checkpoint.write_atomically(self.path / KEY, (json.dumps(self.key, indent=2) + "\n").encode())
            checkpoint.save(self.path / f"{slot:05d}-{len(indices)}-{uuid.uuid4().hex[:16]}.pt", segment)
        except (checkpoint.CheckpointError, OSError) as error:
            self._writes = False
            print(f"warning: {error}; the teacher's answers are not stored from here on")

    def coverage(self) -> dict[int, int]:
        """Slot -> how many images are answered in it."""
        slots = sorted({int(path.name[:5]) for path in self.path.glob("[0-9]*-*.pt")})
        return {slot: int(self.column(slot, torch.device("cpu")).answered.sum()) for slot in slots}


def store_key(
    data: ViewedData,
    teacher: Teacher,
    *,
    teacher_arch: str,
    name: str,
    digest: str,
    classes: int,
    view_seed: int,
    top_k: int = 0,
) -> dict[str, Any]:
    """What an answer depends on, and how it is kept. `name`, `digest`: of the images."""
    spec, network = teacher.network.spec, teacher.network
    key: dict[str, Any] = {"data": name, "data_digest": digest, "images": data.image_count, "classes": classes}
    key |= {"teacher": teacher_arch}
    key["computed_on"] = network.mean.device.type
    key |= {"teacher_digest": teacher.digest, "precision": str(network.precision).removeprefix("torch.")}
    key |= {"size": spec.size, "mean": list(spec.mean), "std": list(spec.std)}
    key |= {"policy": data.policy.name, "view_seed": view_seed}
    if data.policy.view_count is None:
        key["rendered_on"] = data.device.type  # its pixels may differ in the last bit
    if top_k:
        key["top_k"] = top_k
    if data.mixup:
        key["mixup_among"] = checkpoint.digest(torch.from_numpy(data.plan.indices))
    return key


class AnsweredData:
    """Training data whose batches bring the teacher's logits along, from the store where it has them.

    What it has not is answered ahead of the step, as many batches at a time as fill a block of the teacher, and
    stored. Each process answers its own share of the epoch, so that none is answered twice.
    """

    def __init__(self, data: ViewedData, teacher: Teacher, store: LogitStore | None, encoding: Encoding) -> None:
        self.data, self.teacher, self.store, self.encoding = data, teacher, store, encoding
        self.steps_per_epoch, self.labelled = data.steps_per_epoch, data.labelled
        share = data.plan.batch_size // data.plan.share[1]
        self._ahead = max(1, teacher.block // share)  # batches
        self.answered = 0  # views that the teacher has answered in this process, the others came from the store

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        slot = self.data.plan.order.slot(epoch)
        column = self.store.column(slot, self.data.device) if self.store else None
        chosen = (indices for indices, _ in self.data.plan.steps(epoch, first_step))
        fresh: list[NDArray[np.int64]] = []
        flushed = time.monotonic()
        try:
            for group in _grouped(zip(self.data.batches(epoch, first_step), chosen, strict=True), self._ahead):
                for batch, logits in self._answer(group, column, fresh):
                    yield replace(batch, teacher_logits=logits)
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
            for start in range(0, len(missing), self.teacher.block):
                chosen = missing[start : start + self.teacher.block]
                batch = self.data.batch(chosen, self.data.plan.order.shown(slot, chosen))
                list(self._answer([(batch, chosen)], column, fresh))
                yield len(chosen)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    self._flush(slot, column, fresh)
                    flushed = time.monotonic()
        finally:
            self._flush(slot, column, fresh)

    def verify(self, count: int) -> tuple[int, int, float]:
        """Ask the teacher again for a random sample of what is stored: (answers compared, how many are the same bits,
        largest difference of a logit)."""
        assert self.store
        chance, compared, equal, largest = np.random.default_rng(0), 0, 0, 0.0
        count_of_views = self.data.plan.order.view_count
        slots = [slot for slot in self.store.coverage() if count_of_views is None or slot < count_of_views]
        for slot in slots:
            column = self.store.column(slot, self.data.device)
            known = np.flatnonzero(column.answered)
            chosen = np.sort(chance.choice(known, min(len(known), -(-count // len(slots))), replace=False))
            batch = self.data.batch(chosen, self.data.plan.order.shown(slot, chosen))
            again = self.encoding.encode(self.teacher.logits(batch.images), batch.labels)
            stored, logits = column.rows[batch.indices], slice(0, self.encoding.top_k or None)
            difference = (again[:, logits].float() - stored[:, logits].float()).abs().amax(1)
            compared, equal = compared + len(chosen), equal + int((difference == 0).sum())
            largest = max(largest, float(difference.max()))
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
        if any(map(len, unknown)):
            pairs = list(zip(group, unknown, strict=True))
            indices = np.concatenate([indices[rows] for (_, indices), rows in pairs])
            parts = [_rows(batch, torch.from_numpy(rows)) for (batch, _), rows in pairs]
            column.rows[torch.from_numpy(indices).to(column.rows.device)] = self._ask(parts)
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
    there = chosen.to(batch.images.device)
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


def list_stores(root: Path) -> list[dict[str, Any]]:
    """Of each store below `root`: path, key, bytes on disk, views (slots) and answers that it has, from the names of
    its segments; answers that two runs gave at once count twice."""
    found = []
    for file in sorted(root.glob(f"*/{KEY}")):
        segments = list(file.parent.glob("[0-9]*-*-*.pt"))
        answers = sum(int(path.name.split("-")[1]) for path in segments)
        bytes_on_disk = sum(path.stat().st_size for path in segments)
        views = len({path.name[:5] for path in segments})
        key = json.loads(file.read_text())
        found.append({"path": file.parent, "key": key, "bytes": bytes_on_disk, "views": views, "answers": answers})
    return found


def fits(
    slots: int, images: int, encoding: Encoding, limit_gb: float, root: Path, present: int = 0
) -> tuple[bool, str]:
    """Whether `slots` columns fit the limit and the disk, on which `present` bytes of them lie already, and a line that
    says what they take."""
    needed = 2 * slots * images * encoding.width
    existing = next(path for path in (root, *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    kept = f"{encoding.top_k} largest of {encoding.classes}" if encoding.top_k else f"{encoding.classes}"
    line = f"{slots} views of {images:,} images, {kept} logits: {size(needed)} at most"
    if needed > limit_gb * 1e9:
        most = int(limit_gb * 1e9 // (2 * images * encoding.width))
        return False, f"{line}, more than --store-limit {limit_gb:g} GB; --views {most} fits" if most else line
    if needed - present > free:
        return False, f"{line}, but {existing} has {size(free)} left"
    return True, line


def size(count: float) -> str:
    """Bytes in words: 1.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
