"""CIFAR-10 and other small images, all as one uint8 tensor: the sample, the archive, image folders, .npz files."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cifar10 import official
from cifar10.augment import build_policy
from distill import checkpoint
from distill.errors import UserError, too_many_files
from distill.folders import UNLABELLED, list_images
from distill.methods import METHODS
from distill.parallel import first_here, share
from distill.recipe import Recipe
from distill.run_dir import CHECKPOINTS, ROOT
from distill.views import EpochPlan, EvaluationSet, TensorData, ViewDraws, ViewOrder, split_validation

SIZE = 32
SAMPLE = Path(__file__).parent / "sample.webp"  # 200 training, then 100 test images of each class of CIFAR-10
DEFAULT = ROOT / "data" / "cifar10"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LARGEST = 30_000_000  # pixels of one image file; more is a mistake or a decompression bomb

Pixels = NDArray[np.uint8]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ImageData:
    """images: uint8 (N, 32, 32, 3); labels: int64 (N,), from 0 to len(classes) - 1; both for training and test.

    Training images without labels have UNLABELLED for each.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @cached_property
    def digest(self) -> str:
        """sha256 of all pixels, labels and class names."""
        parts = [self.train_images, self.train_labels, self.test_images, self.test_labels]
        return checkpoint.digest([list(self.classes), *parts])

    @cached_property
    def content(self) -> str:
        """sha256 of the same whatever the order of the images: that of the official archive, of a folder, of a file."""
        parts = [(self.train_images, self.train_labels), (self.test_images, self.test_labels)]
        pairs = [zip(images.numpy(), labels.tolist(), strict=True) for images, labels in parts]
        return checkpoint.digest([list(self.classes), *(sorted(map(_told_apart, some)) for some in pairs)])

    @property
    def labelled(self) -> bool:
        """Whether the training images have labels."""
        return bool((self.train_labels != UNLABELLED).all())

    def __str__(self) -> str:
        kind = "training" if self.labelled else "unlabelled training"
        counts = f"{len(self.train_images)} {kind}, {len(self.test_images)} test images"
        return f"{self.name}: {counts}, {len(self.classes)} classes, digest {self.digest[:12]}"


def _told_apart(pair: tuple[Pixels, int]) -> str:
    image, label = pair
    return f"{hashlib.sha256(image.tobytes()).hexdigest()} {label}"


def load_data(source: str | None, *, workers: int = 2, skip_bad_images: bool = False) -> ImageData:
    """What `read_data` reads: of several processes on a machine one downloads and decodes."""
    with first_here():
        return read_data(source, workers=workers, skip_bad_images=skip_bad_images)


def read_data(source: str | None, *, workers: int = 2, skip_bad_images: bool = False) -> ImageData:
    """`sample`, a directory with train/CLASS/* and test/CLASS/* or with CIFAR-10's archive or its unpacked batches, or
    a .npz file. None is data/cifar10, which is filled by download when it is not there.

    Images of another size are resized to 32x32, with a line that says so. A train/ that holds images and no folders is
    unlabelled. Raises UserError.
    """
    if source == "sample":
        return _from_arrays("sample", _read_sample(), str(SAMPLE))
    path = Path(source) if source else DEFAULT
    if source and not path.exists():
        raise UserError(f"--data {source} does not exist")
    if not source and not official.is_begun(path):
        official.download(path)
    if path.is_dir() and official.is_official(path):
        return _from_arrays(path.resolve().name, official.read_official(path), str(path))
    if path.is_dir():
        return _from_arrays(path.resolve().name, _read_folder(path, workers, skip_bad_images), str(path))
    if path.suffix == ".npz" and path.is_file():
        return _from_arrays(path.stem, _read_npz(path), str(path))
    raise UserError(f"--data {source} is neither 'sample' nor a directory nor a .npz file")


def prepare(data: ImageData, recipe: Recipe, device: torch.device) -> tuple[TensorData, dict[str, EvaluationSet]]:
    """The training views of `recipe`, and what its epochs are evaluated on: `test`, and `val` if images are held out.

    Images lie on `device` as uint8. Raises UserError if there are too few of them.
    """
    if not data.labelled:
        if METHODS[recipe.method or "kd"].labels:
            raise UserError(f"the training images have no labels, which --method {recipe.method} wants")
        if recipe.objective == "ce" or recipe.shares[1] or recipe.val_split:
            raise UserError(
                "the training images have no labels: they take trainKD.sh --w 1 (or --ce-weight 0), and no --val-split"
            )
    policy = build_policy(recipe.augment, recipe.view_seed, recipe.views, recipe.cutout)
    count = len(data.train_images)
    if count - recipe.val_split < recipe.batch_size:
        held_out_too = f" less {recipe.val_split} of --val-split" if recipe.val_split else ""
        raise UserError(f"--batch-size {recipe.batch_size} is more than the {count} training images{held_out_too}")
    trained, held_out = split_validation(count, recipe.val_split)
    order = ViewOrder(policy, recipe.view_seed, count, recipe.views)
    plan = EpochPlan(trained, order, recipe.seed, recipe.batch_size, share(), recipe.accumulate)
    mixup = ViewDraws(recipe.view_seed, "mixup", 2) if recipe.mixup else None
    views = TensorData(data.train_images.to(device), data.train_labels.to(device), plan, policy, mixup)
    tests = {"test": EvaluationSet(data.test_images.to(device), data.test_labels.to(device))}
    if len(held_out):
        chosen = torch.from_numpy(held_out).to(device)
        tests["val"] = EvaluationSet(views.images[chosen], views.labels[chosen])
    return views, tests


def _from_arrays(name: str, arrays: Arrays, source: str) -> ImageData:
    """Check and convert arrays with the keys of a .npz file. Raises UserError naming `source` and the array."""
    tensors, highest = {}, 0
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise UserError(f"{source}: {split}_images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
        lowest = UNLABELLED if split == "train" and set(labels.ravel().tolist()) == {UNLABELLED} else 0
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < lowest:
            raise UserError(
                f"{source}: {split}_labels must be integers from 0 on, one for each of the {len(images)} images, "
                f"got {labels.dtype} {labels.shape}"
            )
        highest = max(highest, int(labels.max()))
        tensors[f"{split}_images"] = torch.from_numpy(_resize(images, source))
        tensors[f"{split}_labels"] = torch.from_numpy(labels.astype(np.int64))
    trained = set(arrays["train_labels"].tolist())
    unseen = sorted(set(arrays["test_labels"].tolist()) - trained)
    if unseen and trained != {UNLABELLED}:
        raise UserError(f"{source}: class {unseen[0]} is in test_labels but not in train_labels")
    named = arrays.get("classes")
    if (named is not None and named.ndim != 1) or highest >= len(tensors["train_labels"]):
        raise UserError(
            f"{source}: labels up to {highest} for {len(tensors['train_labels'])} images, or no list of classes"
        )
    classes = tuple(str(c) for c in named) if named is not None else tuple(map(str, range(highest + 1)))
    if highest >= len(classes) or len(classes) < 2:
        raise UserError(
            f"{source}: {len(classes)} classes, labels up to {highest}; it takes a class for each label, and two"
        )
    return ImageData(name, classes, **tensors)


def _resize(images: Pixels, source: str) -> Pixels:
    if images.shape[1:3] == (SIZE, SIZE):
        return np.ascontiguousarray(images)
    print(f"{source}: images of {images.shape[1]}x{images.shape[2]} are resized to {SIZE}x{SIZE}")
    return np.stack([_fit(Image.fromarray(image)) for image in images])


def _fit(image: Image.Image) -> Pixels:
    """(32, 32, 3) uint8; bicubic with antialiasing where the size differs."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


# ---------------------------------------------------------------------------------------------------------- the sample
def _read_sample() -> Arrays:
    mosaic = np.asarray(Image.open(SAMPLE).convert("RGB"))
    rows, columns = mosaic.shape[0] // SIZE, mosaic.shape[1] // SIZE
    tiles = mosaic.reshape(rows, SIZE, columns, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIZE, SIZE, 3)
    train, test = tiles[:2000], tiles[2000:]
    labels = {"train_labels": np.repeat(np.arange(10), 200), "test_labels": np.repeat(np.arange(10), 100)}
    return {"train_images": train, "test_images": test, "classes": np.array(CLASSES), **labels}


# ------------------------------------------------------------------------------------------------------------ npz files
def _read_npz(path: Path) -> Arrays:
    required = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in required if key not in archive]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(required)}")
            return {key: archive[key] for key in [*required, "classes"] if key in archive}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything on damaged input
        raise UserError(f"{path} is damaged or no .npz file of plain arrays ({type(error).__name__})") from None


# -------------------------------------------------------------------------------------------------------------- folders
def _read_folder(path: Path, workers: int, skip_bad_images: bool) -> Arrays:
    """Decode train/CLASS/* (or unlabelled train/*) and test/CLASS/*, or take what an earlier call decoded from them."""
    names, files = list_images(path, "train", "test", unlabelled=True)
    cache = CHECKPOINTS / "cache" / f"images-{_stamp(path, files['train'] + files['test'], skip_bad_images)}.pt"
    if cache.exists():
        try:
            stored = checkpoint.load(cache)
            return {
                key: value.numpy() if isinstance(value, Tensor) else np.array(value) for key, value in stored.items()
            }
        except checkpoint.CheckpointError as error:
            print(f"{error}; decoding again")
    arrays: Arrays = {"classes": np.array(names)}
    for split in ("train", "test"):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = _decode(files[split], split, workers, skip_bad_images)
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items() if key != "classes"}
    checkpoint.save_cache(cache, {"classes": names, **tensors})
    return arrays


def _stamp(path: Path, files: Iterable[tuple[str, int]], skip_bad_images: bool) -> str:
    """Digest of what a decoding depends on: where the files lie, their names, sizes, and times of any change."""
    total = hashlib.sha256(f"1 {SIZE} {skip_bad_images} {path.resolve()}".encode(errors="surrogateescape"))
    for file, _ in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        total.update(
            f"{os.path.relpath(file, path)}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0".encode(
                errors="surrogateescape"
            )
        )
    return total.hexdigest()[:32]


def _decode(
    files: list[tuple[str, int]], split: str, workers: int, skip_bad_images: bool
) -> tuple[Pixels, NDArray[np.int64]]:
    images = np.empty((len(files), SIZE, SIZE, 3), dtype=np.uint8)
    problems, resized, good = [], 0, np.ones(len(files), dtype=bool)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):  # Pillow decodes without holding the interpreter's lock
        warnings.simplefilter("ignore")  # of large images, which are refused below, and of odd metadata
        decoded = pool.map(_decode_file, (file for file, _ in files), chunksize=64)
        for i, (pixels, other_size, problem) in enumerate(tqdm(decoded, f"decoding {split}", len(files), disable=None)):
            resized += other_size
            if problem:
                good[i] = False
                problems.append(problem)
                if not skip_bad_images or len(problems) > max(1, len(files) // 1000):
                    pool.shutdown(cancel_futures=True)
                    raise UserError(f"{problem}; --skip-bad-images leaves out up to 0.1 % of them, or one")
            else:
                images[i] = pixels
    for problem in problems:
        print(f"left out: {problem}")
    if resized:
        print(f"{split}: {resized} of {len(files)} images are resized to {SIZE}x{SIZE}")
    labels = np.array([label for _, label in files], dtype=np.int64)
    return images[good], labels[good]


def _decode_file(file: str) -> tuple[Pixels, bool, str]:
    """(pixels, whether they were resized, problem); CMYK, palettes, grey, 16 bits and transparency become RGB."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {LARGEST:,}")
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them instead of scaling
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            else:
                rgb = image.convert("RGB")
            return _fit(rgb), rgb.size != (SIZE, SIZE), ""
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        if too_many_files(error):  # nothing is wrong with this one
            raise
        return np.empty(0, dtype=np.uint8), False, f"cannot decode {file}: {type(error).__name__}: {str(error)[:120]}"
