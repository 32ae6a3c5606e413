"""CIFAR-10 and other small images, all as one uint8 tensor: the sample, the archive, image folders, .npz files."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cifar10 import official
from cifar10.augment import build_policy
from cifar10.classes import CLASSES
from cifar10.folder import SIZE, Pixels, fit, read_folder
from cifar10.npz import read_npz
from distill.config.recipe import Recipe
from distill.data.datasets import TensorData, TensorTestData
from distill.data.draws import ViewDraws
from distill.data.folders import UNLABELLED
from distill.data.order import EpochPlan, ViewOrder, smaller_batch, split_validation
from distill.data.views import check_cutout
from distill.errors import UserError
from distill.files import checkpoint
from distill.models.class_order import shortened
from distill.parallel.processes import first_here, rank_and_world_size
from distill.run.directory import ROOT

SAMPLE = Path(__file__).parent / "sample.webp"  # 200 training, then 100 test images of each class of CIFAR-10
DEFAULT = ROOT / "data" / "cifar10"

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

    @property
    def counts(self) -> str:
        """Returns `50000 training, 10000 test images`."""
        kind = "training" if self.labelled else "unlabelled training"
        return f"{len(self.train_images)} {kind}, {len(self.test_images)} test images"

    def __str__(self) -> str:
        return f"{self.name}: {self.counts}, {len(self.classes)} classes, digest {self.digest[:12]}"


def _told_apart(pair: tuple[Pixels, int]) -> str:
    image, label = pair
    return f"{hashlib.sha256(image.tobytes()).hexdigest()} {label}"


def load_data(source: str | None, *, workers: int = 2, skip_bad_images: bool = False) -> ImageData:
    """What `read_data` reads: of several processes on a machine one downloads and decodes."""
    with first_here():
        return read_data(source, workers=workers, skip_bad_images=skip_bad_images)


def read_data(source: str | None, *, workers: int = 2, skip_bad_images: bool = False) -> ImageData:
    """Returns the images that --data names. Raises UserError.

    source: `sample`, a directory with train/CLASS/* and test/CLASS/*, or with the archive of CIFAR-10 or CIFAR-100 or
    its unpacked batches, or a .npz file. None is data/cifar10, which is filled by download when it is not there.

    Images of another size are resized to 32x32, with a line that says so. A train/ that holds images and no folders is
    unlabelled.
    """
    if source == "sample":
        return _from_arrays("sample", _read_sample(), str(SAMPLE))
    path = Path(source) if source else DEFAULT
    if source and not path.exists():
        raise UserError(f"--data {source} does not exist")
    if not source and not official.is_begun(path):
        official.download(path)
    if path.is_dir() and (published := official.find_official(path)):
        print(f"{path}: {published.name}, {published.labels.replace('_', ' ')}")
        return _from_arrays(path.resolve().name, official.read_official(path, published), str(path))
    if path.is_dir():
        return _from_arrays(path.resolve().name, read_folder(path, workers, skip_bad_images), str(path))
    if path.suffix.lower() == ".npz" and path.is_file():
        return _from_arrays(path.stem, read_npz(path), str(path))
    raise UserError(f"--data {source} is neither 'sample' nor a directory nor a .npz file")


def prepare(data: ImageData, recipe: Recipe, device: torch.device) -> tuple[TensorData, dict[str, TensorTestData]]:
    """The training views of `recipe`, and what its epochs are evaluated on: `test`, and `val` if images are held out.

    Images lie on `device` as uint8. Raises UserError if there are too few of them.
    """
    if not data.labelled:
        if recipe.method and recipe.method.needs_labels:
            raise UserError(f"the training images have no labels, which --method {recipe.method.name} wants")
        if recipe.loss_weights[1] or recipe.val_split:
            raise UserError(
                "the training images have no labels: they take trainKD.sh --w 1 (or --ce-weight 0), and no --val-split"
            )
    check_cutout(recipe.cutout, SIZE)
    policy = build_policy(recipe)
    count = len(data.train_images)
    if count - recipe.val_split < recipe.batch_size:
        held_out_too = f" less {recipe.val_split} of --val-split" if recipe.val_split else ""
        raise UserError(
            f"--batch-size {recipe.batch_size} is more than the {count} training images{held_out_too}"
            f"{smaller_batch(recipe.batch_size, recipe.lr, count - recipe.val_split)}"
        )
    trained, held_out = split_validation(count, recipe.val_split)
    order = ViewOrder(policy, recipe.view_seed, count, recipe.views)
    plan = EpochPlan(trained, order, recipe.seed, recipe.batch_size, *rank_and_world_size(), recipe.accumulate)
    mixup = ViewDraws(recipe.view_seed, "mixup", 2) if recipe.mixup else None
    views = TensorData(data.train_images.to(device), data.train_labels.to(device), plan, policy, mixup)
    tests = {"test": TensorTestData(data.test_images.to(device), data.test_labels.to(device))}
    if len(held_out):
        chosen = torch.from_numpy(held_out).to(device)
        tests["val"] = TensorTestData(views.images[chosen], views.labels[chosen])
    return views, tests


def _from_arrays(name: str, arrays: Arrays, source: str) -> ImageData:
    """Check and convert arrays with the keys of a .npz file. Raises UserError naming `source` and the array."""
    tensors, highest = {}, 0
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            grey = " or, in an .npz file, (N, H, W)" if images.ndim == 3 else ""
            scaled = "; floats from 0 to 1: (255 * images).round().astype('uint8')" * (images.dtype.kind == "f")
            got = f"got {images.dtype} {images.shape}{scaled}"
            raise UserError(f"{source}: {split}_images must be uint8 (N, H, W, 3){grey}, {got}")
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
    classes = tuple(map(str, named)) if named is not None else tuple(map(str, range(highest + 1)))
    lowest = int(min(labels.min() for key, labels in tensors.items() if key.endswith("labels")))
    from_one = f"labels run from {lowest} to {highest}, none is 0: if {lowest} is the first class, subtract {lowest}"
    if highest >= len(classes) or len(classes) < 2:
        hint = f"; {from_one}" if lowest > 0 else ""
        raise UserError(
            f"{source}: {len(classes)} classes, labels up to {highest}; it takes a class for each label, and two{hint}"
        )
    if lowest > 0:
        print(f"note: {source}: class {classes[0]} has no images; {from_one}")
    elif trained != {UNLABELLED} and (empty := [name for k, name in enumerate(classes) if k not in trained]):
        print(f"note: {source}: {len(empty)} of {len(classes)} classes have no training images: {shortened(empty)}")
    return ImageData(name, classes, **tensors)


def _resize(images: Pixels, source: str) -> Pixels:
    if images.shape[1:3] == (SIZE, SIZE):
        return np.ascontiguousarray(images)
    print(f"{source}: images of {images.shape[1]}x{images.shape[2]} are resized to {SIZE}x{SIZE}")
    return np.stack([fit(Image.fromarray(image)) for image in images])


# ---------------------------------------------------------------------------------------------------------- the sample
def _read_sample() -> Arrays:
    mosaic = np.asarray(Image.open(SAMPLE).convert("RGB"))
    rows, columns = mosaic.shape[0] // SIZE, mosaic.shape[1] // SIZE
    tiles = mosaic.reshape(rows, SIZE, columns, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIZE, SIZE, 3)
    train, test = tiles[:2000], tiles[2000:]
    labels = {"train_labels": np.repeat(np.arange(10), 200), "test_labels": np.repeat(np.arange(10), 100)}
    return {"train_images": train, "test_images": test, "classes": np.array(CLASSES), **labels}
