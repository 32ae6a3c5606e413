"""Teacher logits on disk: those of each view are computed once, for every run that shows it.

A store belongs to one teacher, one set of images and one kind of views; its key says which, in clear text. The logits
of all images in one view index, epoch mod K (order.ViewOrder), are rows of float16 (images, classes). They lie on disk
as segments: files that are written once, verified by digest and merged when they are read. So any number of runs add
to one store without a lock, a kill leaves a whole segment or none, and a damaged segment is named, put aside, and its
views are computed again.
"""

import json
import re
import shutil
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.datasets import TrainingData
from distill.errors import CannotReadError, CheckpointError, UserError
from distill.files import checkpoint
from distill.losses.top_k import TEMPERATURES, TopKLogits, top_k_logits
from distill.teacher.teacher import Teacher

KEY, ASIDE = "key.json", ".damaged"
SEGMENT = re.compile(r"\d{5,}-\d+-\w+\.pt")  # view index, count of rows, a name of its own
LEFT_SECONDS = 86_400  # after which a file that is still being written is taken for left behind
FORMAT = 1  # of the segments, and of what the views of a policy look like: another number is another store


@dataclass(frozen=True)
class Encoding:
    """How the logits of an image are kept, as a row of float16: all, or with `top_k` the bits of a TopKLogits."""

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
        """Returns float16 (B, width) of logits float32 (B, C), with values that float16 has, and labels (B,)."""
        if not self.top_k:
            return logits.half()
        kept = top_k_logits(logits, labels, self.top_k)
        classes, rest = kept.classes.to(torch.int16).view(torch.float16), kept.rest.contiguous().view(torch.float16)
        return torch.cat([kept.values.half(), classes, kept.label.half().unsqueeze(1), rest], dim=1)

    def decode(self, rows: Tensor) -> Tensor | TopKLogits:
        """Returns float32 (B, C), or TopKLogits, of rows float16 (B, width)."""
        if not self.top_k:
            return rows.float()
        sizes = [self.top_k, self.top_k, 1, 2 * len(TEMPERATURES)]
        values, classes, label, rest = torch.split(rows, sizes, dim=1)
        numbers = classes.contiguous().view(torch.int16).long()
        aligned = rest.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a single row where it is
        return TopKLogits(values.float(), numbers, label.float().squeeze(1), aligned.view(torch.float32))


class LogitStore:
    """The store of `key`, of store_key(), in a directory below `root`."""

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        self.key, self.images = {"format": FORMAT, **key}, key["images"]
        self.encoding = Encoding(key["classes"], key.get("top_k", 0))
        self.digest = checkpoint.digest({name: value for name, value in self.key.items() if name != "data"})
        self.path = root / f"{key['teacher']}-{self.digest[:16]}"
        self.writes = True  # until a segment cannot be written

    def read(self, view_index: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """Returns the rows float16 (N, width) of one view index, on the CPU, and which of the N are there."""
        rows = torch.zeros(self.images, self.encoding.width, dtype=torch.float16)
        present = np.zeros(self.images, dtype=bool)
        for path in sorted(self.path.glob(f"{view_index:05d}-*.pt")):
            try:
                which, segment_rows = self._read_segment(path, view_index)
            except CheckpointError as error:
                if path.exists():  # else another process has put it aside or removed it
                    print(f"{error}; its views are computed again")
                    if not isinstance(error, CannotReadError):
                        with suppress(OSError):
                            path.rename(path.with_name(path.name + ASIDE))
                continue
            rows[torch.from_numpy(which)] = segment_rows
            present |= which
        return rows, present

    def _read_segment(self, path: Path, view_index: int) -> tuple[NDArray[np.bool_], Tensor]:
        """Returns which of the images a segment has, bool (N,), and their rows (n, width). Raises CheckpointError."""
        segment = checkpoint.load(path)
        try:
            bits, rows = segment["which"], segment["rows"]
            whole = segment["key"] == self.digest and segment["slot"] == view_index
            whole &= bits.dtype == torch.uint8 and bits.shape == (-(-self.images // 8),)
            which = np.unpackbits(bits.numpy(), count=self.images).astype(bool)
            whole &= rows.dtype == torch.float16 and rows.shape == (int(which.sum()), self.encoding.width)
        except (KeyError, AttributeError, TypeError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path} is no segment of this store")
        return which, rows

    def write(self, view_index: int, indices: NDArray[np.int64], rows: Tensor) -> None:
        """Adds a segment: rows (n, width) of the images `indices` (n,); on disk in ascending order, and a bit an image.

        Where it cannot be written the store is only read from then on, with one line that says so: logits that are lost
        cost time, not the run.
        """
        if not self.writes or not len(indices):
            return
        which = np.zeros(self.images, dtype=bool)
        which[indices] = True
        ascending = torch.from_numpy(np.argsort(indices)).to(rows.device)
        segment: dict[str, Any] = {
            "key": self.digest,
            "slot": view_index,
            "which": torch.from_numpy(np.packbits(which)),
        }
        segment["rows"] = rows[ascending].cpu()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / KEY).exists():
                checkpoint.write_atomically(self.path / KEY, (json.dumps(self.key, indent=2) + "\n").encode())
            checkpoint.save(self.path / f"{view_index:05d}-{len(indices)}-{uuid.uuid4().hex[:16]}.pt", segment)
        except (CheckpointError, OSError) as error:
            self.writes = False
            warning = f"warning: {error}; the teacher's logits are not stored from here on"
            print(warning, file=sys.stderr)  # of every process: each has its own disk to fail

    def tidy(self) -> int:
        """Returns the bytes of all segments; removes what processes that were killed inside a save left behind."""
        total = 0
        for path in self.path.glob("*"):
            with suppress(OSError):  # another process has put it aside or removed it
                status = path.stat()
                total += status.st_size if path.suffix == ".pt" else 0
                if path.suffix == checkpoint.TEMPORARY and time.time() - status.st_mtime > LEFT_SECONDS:
                    path.unlink()
        return total

    def coverage(self) -> dict[int, int]:
        """Returns how many images each view index has."""
        segments = (path.name for path in self.path.glob("*.pt") if SEGMENT.fullmatch(path.name))
        view_indices = sorted({int(name.split("-")[0]) for name in segments})
        return {view_index: int(self.read(view_index)[1].sum()) for view_index in view_indices}


def store_key(
    data: TrainingData,
    teacher: Teacher,
    *,
    teacher_arch: str,
    name: str,
    digest: str,
    classes: int,
    view_seed: int,
    top_k: int = 0,
) -> dict[str, Any]:
    """Returns what logits depend on, and how they are kept. `name`, `digest`: of the images; `name` is for people."""
    spec, network = teacher.network.spec, teacher.network
    key: dict[str, Any] = {"data": name, "data_digest": digest, "images": data.image_count, "classes": classes}
    key |= {"teacher": teacher_arch}
    key["computed_on"] = network.mean.device.type
    key |= {"teacher_digest": teacher.digest, "precision": str(network.precision).removeprefix("torch.")}
    key |= {"size": spec.size, "mean": list(spec.mean), "std": list(spec.std)}
    if spec.resized:
        key["interpolation"] = spec.interpolation
    key |= {"policy": data.policy.name, "view_seed": view_seed}
    if data.policy.view_count is None:
        key["rendered_on"] = data.device.type  # its pixels may differ in the last bit
    if top_k:
        key["top_k"] = top_k
    if data.mixup:
        key["mixup_among"] = checkpoint.digest(torch.from_numpy(data.plan.indices))
    return key


def list_stores(root: Path) -> list[dict[str, Any]]:
    """Returns of each store below `root` its path, key, bytes on disk, number of views, and answers (rows).

    They are counted by the names of its segments; rows that two runs wrote at once count twice. In place of a key that
    cannot be read stands a line that says why.
    """
    stores = []
    for file in sorted(root.glob(f"*/{KEY}")):
        segments = [path for path in file.parent.glob("*.pt") if SEGMENT.fullmatch(path.name)]
        rows = sum(int(path.name.split("-")[1]) for path in segments)
        bytes_on_disk = sum(path.stat().st_size for path in segments)
        views = len({path.name.split("-")[0] for path in segments})
        stores.append(
            {"path": file.parent, "key": _read_key(file), "bytes": bytes_on_disk, "views": views, "answers": rows}
        )
    return stores


def _read_key(file: Path) -> dict[str, Any] | str:
    try:
        key = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        key = str(getattr(error, "strerror", None) or error)
    if isinstance(key, dict):
        return key
    return f"{file} is damaged ({key}): remove it, and the next run that adds logits writes it again"


def fits(
    views: int,
    images: int,
    encoding: Encoding,
    limit_gb: float,
    root: Path,
    present: int = 0,
    *,
    even: bool = False,
) -> tuple[bool, str]:
    """Returns whether `views` views of all images fit the limit and the disk, and a line that says what they take.

    present: the bytes of them that lie on the disk already. even: whether --views must be.
    """
    needed = 2 * views * images * encoding.width
    existing = next(path for path in (root, *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    kept = f"{encoding.top_k} largest of {encoding.classes}" if encoding.top_k else f"{encoding.classes}"
    line = f"{views} views of {images:,} images, {kept} logits: {size(needed)} at most"
    if needed > limit_gb * 1e9:
        most = int(limit_gb * 1e9 // (2 * images * encoding.width))
        most -= most % 2 if even else 0
        fitting = f"; --views {most} fits" if most else ""
        return False, f"{line}, more than --store-limit {limit_gb:g} GB{fitting}"
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
