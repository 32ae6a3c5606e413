"""Folders of small images: decoded once, and kept."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from distill.data.folders import Labelled, list_images
from distill.data.pixels import FIRST, is_dim, is_turned, open_image, say_dim, say_turned, to_rgb
from distill.errors import BrokenImage, CheckpointError
from distill.files import checkpoint
from distill.run.directory import CHECKPOINTS

SIZE = 32
PART = 256  # images that are decoded ahead of those that a network sees
AT_ONCE = 4096  # files given to the threads together: each is a task, of 2 kB
LARGEST = 30_000_000  # pixels of one image file; more is a mistake or a decompression bomb

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """A file's pixels (32, 32, 3), and whether they were resized, EXIF would turn them, they are nearly black."""

    pixels: Pixels
    resized: bool
    turned: bool
    dim: bool


@dataclass
class Split:
    """The images of a split, and what there is to say of them."""

    images: Pixels
    labels: NDArray[np.int64]
    broken: dict[str, str] = field(default_factory=dict)  # file -> why it cannot be decoded
    resized: int = 0
    turned: int = 0  # of the first 1,000
    dim: list[str] = field(default_factory=list)


def read_folder(path: Path, workers: int, skip_bad_images: bool) -> dict[str, NDArray[Any]]:
    """Decodes train/CLASS/* (or unlabelled train/*) and test/CLASS/*, or take what an earlier call decoded from them.

    Raises BrokenImage with all files that cannot be decoded, UserError for folders that do not fit.
    """
    names, files = list_images(path, "train", "test", unlabelled=True)
    cache = CHECKPOINTS / "cache" / f"images-{_stamp(path, files['train'] + files['test'], skip_bad_images)}.pt"
    if cache.exists():
        try:
            stored = checkpoint.load(cache)
            return {
                key: value.numpy() if isinstance(value, Tensor) else np.array(value) for key, value in stored.items()
            }
        except CheckpointError as error:
            print(f"{error}; decoding again")
    splits = {split: _decode(files[split], split, workers) for split in ("train", "test")}
    _settle(splits, files, skip_bad_images)
    arrays: dict[str, NDArray[Any]] = {}
    for name, split in splits.items():
        arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    if not any(split.broken for split in splits.values()):  # a disk may give next time what it did not give now
        checkpoint.save_cache(
            cache, {"classes": names, **{key: torch.from_numpy(value) for key, value in arrays.items()}}
        )
    return {"classes": np.array(names), **arrays}


def decode_files(files: Sequence[str], workers: int) -> Iterator[Tensor]:
    """Yields the images of `files` in parts of 256, uint8 (B, 32, 32, 3); the next part is decoded meanwhile.

    Says at the end how many were resized. Raises BrokenImage with those files of a part that cannot be decoded.
    """
    resized = 0
    parts = [files[start : start + PART] for start in range(0, len(files), PART)]
    with warnings.catch_warnings(), ThreadPoolExecutor(max(1, workers)) as pool:
        warnings.simplefilter("ignore")
        waiting = [pool.map(_decode_file, part) for part in parts[:1]]
        for following in [*parts[1:], []]:
            decoded = list(waiting.pop())
            waiting.append(pool.map(_decode_file, following))
            if broken := [found.files for found in decoded if isinstance(found, BrokenImage)]:
                raise BrokenImage({file: cause for of_file in broken for file, cause in of_file.items()})
            good = [found for found in decoded if isinstance(found, Decoded)]
            resized += sum(found.resized for found in good)
            yield torch.from_numpy(np.stack([found.pixels for found in good]))
    if resized:
        print(f"{resized} of {len(files)} images are resized to {SIZE}x{SIZE}")


def fit(image: Image.Image) -> Pixels:
    """(32, 32, 3) uint8; bicubic with antialiasing where the size differs."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _stamp(path: Path, files: Iterable[tuple[str, int]], skip_bad_images: bool) -> str:
    """Digest of what a decoding depends on: where the files lie, their names, sizes, and times of any change."""
    total = hashlib.sha256(f"2 {SIZE} {skip_bad_images} {path.resolve()}".encode(errors="surrogateescape"))
    for file, _ in files:
        try:
            status = os.stat(file)
            known = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
        except OSError:  # decoding says what is wrong
            known = ""
        total.update(f"{os.path.relpath(file, path)}\0{known}\0".encode(errors="surrogateescape"))
    return total.hexdigest()[:32]


def _decode(files: Labelled, name: str, workers: int) -> Split:
    images, good = np.empty((len(files), SIZE, SIZE, 3), dtype=np.uint8), np.ones(len(files), dtype=bool)
    split = Split(images, np.array([label for _, label in files], dtype=np.int64))
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):  # Pillow decodes without holding the interpreter's lock
        warnings.simplefilter("ignore")  # of large images, which are refused, and of odd metadata
        parts = (files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE))
        decoded = (found for part in parts for found in pool.map(_decode_file, [file for file, _ in part]))
        for i, found in enumerate(tqdm(decoded, f"decoding {name}", len(files), disable=None)):
            if isinstance(found, BrokenImage):
                good[i] = False
                split.broken |= found.files
                continue
            images[i] = found.pixels
            split.resized += found.resized
            split.turned += found.turned and i < FIRST
            split.dim += [files[i][0]] if found.dim else []
    if not good.all():
        split.images, split.labels = images[good], split.labels[good]
    return split


def _decode_file(file: str) -> Decoded | BrokenImage:
    try:
        with open_image(file, LARGEST) as (image, _):
            rgb = to_rgb(image)
            return Decoded(fit(rgb), rgb.size != (SIZE, SIZE), is_turned(image), is_dim(image))
    except BrokenImage as error:
        return error


def _settle(splits: dict[str, Split], files: dict[str, Labelled], skip_bad_images: bool) -> None:
    """Say what is odd about the images. Raises BrokenImage unless what is broken may be left out."""
    broken = {file: cause for split in splits.values() for file, cause in split.broken.items()}
    many = any(len(split.broken) > max(1, len(files[name]) // 1000) for name, split in splits.items())
    if broken and (many or not skip_bad_images):
        raise BrokenImage(broken)
    for file, cause in broken.items():
        print(f"left out: cannot decode {file}: {cause}")
    for name, split in splits.items():
        if split.resized:
            print(f"{name}: {split.resized} of {len(files[name])} images are resized to {SIZE}x{SIZE}")
    say_turned(splits["train"].turned, min(FIRST, len(files["train"])))
    say_dim([file for split in splits.values() for file in split.dim])
