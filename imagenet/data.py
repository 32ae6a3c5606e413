"""Photos in folders: listed once, decoded in workers each time they are shown."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.datasets import Batch, Mixture, TrainingData
from distill.data.draws import uniforms_of
from distill.data.folders import Labelled, list_images
from distill.data.order import EpochPlan, Selection, ViewOrder, smaller_batch, split_validation
from distill.data.views import check_cutout, mix
from distill.errors import BrokenImage, UserError
from distill.files import checkpoint
from distill.models.classifier import InputSpec
from distill.parallel.devices import images_at_once
from distill.parallel.processes import first_here, is_first_here, of_first_here, rank_and_world_size
from distill.run.directory import RunDirectory
from imagenet.augment import PhotoViews
from imagenet.loader import Job, Workers
from imagenet.recipes import ImageNetRecipe
from imagenet.survey import without_broken
from imagenet.val_map import classes_of

TRAIN, VAL = "train", "val"
BATCH = {"cpu": 128, "cuda": 512}  # photos of up to 224 pixels that are evaluated at a time


@dataclass(frozen=True)
class Photos:
    """Files, and labels int64 (N,) from 0 to len(classes) - 1, of both splits."""

    name: str
    classes: tuple[str, ...]
    train_files: Sequence[str]
    train_labels: Tensor
    val_files: Sequence[str]
    val_labels: Tensor
    digest: str  # of the files' names below the directory, their sizes, and the classes; not of what is in them
    root: Path

    labelled = True

    @property
    def counts(self) -> str:
        """How many photos there are, in words."""
        return f"{len(self.train_files)} training, {len(self.val_files)} validation photos"

    def __str__(self) -> str:
        return f"{self.name}: {self.counts}, {len(self.classes)} classes, digest {self.digest[:12]}"


def load_data(source: str | None, workers: Workers, *, skip_bad_images: bool = False) -> Photos:
    """Returns the photos of `source`, a directory with train/CLASS/* and val/CLASS/*. Raises UserError.

    Or with val/* and a file that says their classes.
    skip_bad_images: every file is decoded once, and what cannot be is left out; remembered as long as no file changes.
    """
    if not source:
        raise UserError("DATA is missing: the directory that holds train/CLASS/* and val/CLASS/* images")
    path = Path(source)
    if not path.is_dir():
        raise UserError(f"{source} is no directory: it needs train/CLASS/* and val/CLASS/* images")
    with first_here():
        classes, listed = list_images(path, TRAIN, VAL, classes_of=partial(classes_of, path))
        if len(classes) < 2:
            raise UserError(f"{path} has one class, {classes[0]!r}: it takes two")
        if skip_bad_images:
            listed = without_broken(listed, workers)
        digest = _digest(path, classes, listed) if is_first_here() else ""  # it asks the disk for each file
    digest = of_first_here(digest)
    columns = [column for split in (TRAIN, VAL) for column in zip(*listed[split], strict=True)]
    files, labels = columns[::2], [torch.tensor(column) for column in columns[1::2]]
    return Photos(path.resolve().name, tuple(classes), files[0], labels[0], files[1], labels[1], digest, path)


def _digest(
    path: Path, classes: Sequence[str], listed: dict[str, Labelled], former: Mapping[str, int] | None = None
) -> str:
    """Returns the digest of classes, names and sizes, which are the same in a copy of the directory.

    A file without a class folder counts as if it lay in one. former: sizes of some files, by their paths wherever the
    directory was, that count in place of what they are. Raises BrokenImage for files that are not there.
    """
    sizes, broken = list[str | int](), {}
    for split, pairs in listed.items():
        for file, label in pairs:
            name = os.path.relpath(file, path)
            try:
                size = os.stat(file).st_size
            except OSError as error:
                broken[file] = str(error.strerror)
                continue
            size = next((before for where, before in (former or {}).items() if where.endswith(f"/{name}")), size)
            if os.path.dirname(name) == split:
                name = os.path.join(split, classes[label], os.path.basename(name))
            sizes += [name, size]
    if broken:
        raise BrokenImage(broken)
    return checkpoint.digest([list(classes), sizes])


def known_to(run: RunDirectory, photos: Photos) -> Photos:
    """Returns `photos`, under the digest by which the run knows them if only files have changed that it found broken.

    Nobody has seen these before.
    """
    before, broken = run.recorded("data_digest"), run.broken()
    if before in (None, photos.digest) or not broken:
        return photos
    splits = {TRAIN: (photos.train_files, photos.train_labels), VAL: (photos.val_files, photos.val_labels)}
    listed = {split: list(zip(files, labels.tolist(), strict=True)) for split, (files, labels) in splits.items()}
    if _digest(photos.root, photos.classes, listed, broken) != before:
        return photos
    print(f"{len(broken)} files that were broken have changed: the run goes on with them")
    return replace(photos, digest=before)


class PhotoData(TrainingData):
    """Training data whose views are rendered in the workers, and sent to `device` as uint8."""

    policy: PhotoViews
    labelled, from_files = True, True

    def __init__(
        self,
        files: Sequence[str],
        labels: Tensor,
        plan: EpochPlan,
        policy: PhotoViews,
        workers: Workers,
        device: torch.device,
        *,
        mixup: bool = False,
    ) -> None:
        self.files, self.labels, self.plan, self.policy = files, labels, plan, policy
        self.workers, self.device, self.mixup, self.image_count = workers, device, mixup, len(files)

    def render(self, selections: Iterable[Selection]) -> Iterator[Batch]:
        """Yields the batch of each selection; the workers render the next ones meanwhile."""
        planned = deque[tuple[Selection, NDArray[np.int64], NDArray[np.float32]]]()

        def jobs() -> Iterator[Job]:
            for selection in selections:
                partners, coefficients = self._partners(self._draws(selection))
                planned.append((selection, partners, coefficients))
                indices = np.concatenate([selection.indices, partners])
                views = np.concatenate([selection.views, selection.views[: len(partners)]])
                yield Job([self.files[i] for i in indices.tolist()], indices, views)

        for images in self.workers.render(self.policy, jobs()):
            yield self._batch(to_device(images, self.device), *planned.popleft())

    def _batch(
        self, images: Tensor, selection: Selection, partners: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> Batch:
        """images: those of the selection, and those of their partners if there are any."""
        indices, mixture = torch.from_numpy(selection.indices), None
        if self.mixup:
            coefficient = to_device(torch.from_numpy(coefficients), self.device)
            mixture = Mixture(to_device(self.labels[torch.from_numpy(partners)], self.device), coefficient)
            images = mix(images[: len(indices)], images[len(indices) :], coefficient)
        return Batch(images, to_device(self.labels[indices], self.device), indices, mixture, epoch=selection.epoch)

    def _draws(self, selection: Selection) -> NDArray[np.float64]:
        """Returns the numbers (B, 4) that each photo's mixture is drawn with; without mixup (0, 4)."""
        pairs = zip(selection.indices.tolist(), selection.views.tolist(), strict=True) if self.mixup else ()
        drawn = [uniforms_of(self.policy.view_seed, "mixup", v, i, 4) for i, v in pairs]
        return np.array(drawn).reshape(-1, 4)


class PhotoTestData:
    """Photos to evaluate on, as a TestData, as the network of `spec` wants them."""

    def __init__(
        self,
        files: Sequence[str],
        labels: Tensor,
        spec: InputSpec,
        workers: Workers,
        device: torch.device,
        decoder: str,
    ) -> None:
        self.files, self.labels, self._workers = files, labels.to(device), workers
        self._device = device
        self._policy = PhotoViews("none", spec.size, 0, decoder, 0, spec.resized, spec.interpolation)
        self.name = self._policy.name

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels, as TestData says."""
        first, last = (len(self.files) * k // world_size for k in (rank, rank + 1))
        size = images_at_once(BATCH[self._device.type], self._policy.size)
        starts = range(first, last, size)
        jobs = (np.arange(start, min(start + size, last)) for start in starts)
        rendered = self._workers.render(
            self._policy, (Job([self.files[i] for i in job.tolist()], job, np.zeros_like(job)) for job in jobs)
        )
        for start, images in zip(starts, rendered, strict=True):
            yield to_device(images, self._device), self.labels[start : start + len(images)]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns `values` on `device`; the copy to a GPU goes on while this process does."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def prepare(
    photos: Photos,
    recipe: ImageNetRecipe,
    spec: InputSpec,
    teacher_spec: InputSpec | None,
    workers: Workers,
    device: torch.device,
) -> tuple[PhotoData, dict[str, PhotoTestData]]:
    """Returns the training data of `recipe`, and by name what its epochs are evaluated on. Raises UserError.

    That is `test` (val/), and `val` if photos of train/ are held out. `spec`, `teacher_spec`: of the student and the
    teacher.
    """
    count = len(photos.train_files)
    if count - recipe.val_split < recipe.batch_size:
        held_out_too = f" less {recipe.val_split} of --val-split" if recipe.val_split else ""
        raise UserError(
            f"--batch-size {recipe.batch_size} is more than the {count} training photos{held_out_too}"
            f"{smaller_batch(recipe.batch_size, recipe.lr, count - recipe.val_split)}"
        )
    size = recipe.render_size or (teacher_spec or spec).size
    check_cutout(recipe.cutout, size)
    policy = PhotoViews(
        recipe.augment,
        size,
        recipe.view_seed,
        recipe.decoder,
        recipe.cutout,
        round(size * spec.resized / spec.size),
        spec.interpolation,
    )
    if recipe.views and policy.view_count and recipe.views > policy.view_count:
        raise UserError(f"--views must be at most 1 with --augment none, got {recipe.views}")
    trained, held_out = split_validation(count, recipe.val_split)
    order = ViewOrder(policy, recipe.view_seed, count, recipe.views)
    plan = EpochPlan(trained, order, recipe.seed, recipe.batch_size, *rank_and_world_size(), recipe.accumulate)
    data = PhotoData(photos.train_files, photos.train_labels, plan, policy, workers, device, mixup=recipe.mixup)
    tests = {"test": PhotoTestData(photos.val_files, photos.val_labels, spec, workers, device, recipe.decoder)}
    if len(held_out):
        files = [photos.train_files[i] for i in held_out.tolist()]
        labels = photos.train_labels[torch.from_numpy(held_out)]
        tests["val"] = PhotoTestData(files, labels, spec, workers, device, recipe.decoder)
    return data, tests
