"""Where the teacher of a run on photos comes from: a file, or its published weights."""

from pathlib import Path

import torch
from torch import nn

from distill import checkpoint
from distill.errors import UserError
from distill.features import find_places
from distill.networks import Network, fetch
from distill.overhaul import FeatureLoss
from distill.parallel import choose_teacher_precision, on_main
from distill.registry import Classifier
from distill.run_dir import CHECKPOINTS
from distill.teacher import Known, Teacher, introduce
from imagenet.data import Photos, PhotoTests
from imagenet.loader import Workers
from imagenet.models import CLASSES, find_trained
from imagenet.recipes import ImageNetOptions, ImageNetRecipe

RANDOM = "none"  # --teacher-checkpoint none: no weights at all


def find_teacher(recipe: ImageNetRecipe, options: ImageNetOptions) -> Network:
    """The network of the teacher of `recipe`, as its weights want to see photos."""
    named = options.teacher_checkpoint
    return find_trained(recipe.teacher_arch or "", recipe.teacher_weights, None if named == RANDOM else named)


def load_teacher(
    recipe: ImageNetRecipe,
    options: ImageNetOptions,
    known: Network,
    photos: Photos,
    workers: Workers,
    device: torch.device,
    auto_precision: str | None = None,
) -> tuple[Teacher, Known]:
    """The frozen teacher `known` of `recipe`, and what it knows of the validation photos, as it wants to see them.

    auto_precision: what --teacher-precision auto means, if it is settled already. Raises UserError if the weights do
    not fit the architecture or the number of classes.
    """
    precision = (auto_precision or "auto") if recipe.teacher_precision == "auto" else recipe.teacher_precision
    teacher, source = _build(options, known, len(photos.classes), precision, device)
    test = PhotoTests(photos.val_files, photos.val_labels, known.spec, workers, device, recipe.decoder)
    digest = checkpoint.digest([photos.digest, test.name, str(known.spec)])
    return teacher, introduce(teacher, test, digest, f"{known.arch} from {source}", CHECKPOINTS / "cache" / "teachers")


def _build(
    options: ImageNetOptions, known: Network, classes: int, precision: str, device: torch.device
) -> tuple[Teacher, str]:
    torch.manual_seed(0)  # of random weights
    network = known.build(num_classes=classes)
    source = load_weights(network, known, options.teacher_checkpoint, classes)
    classifier = Classifier(network, known.spec, choose_teacher_precision(precision, device)).to(device)
    return Teacher(classifier, options.device), source


def check_places(recipe: ImageNetRecipe, known: Network, student: Classifier, classes: int) -> None:
    """Raises UserError where --overhaul finds no stages in one of the networks, before anything is fetched for it."""
    if recipe.overhaul:
        find_places(student, recipe.arch)
        with torch.random.fork_rng(devices=[]):
            find_places(Classifier(known.build(num_classes=classes), known.spec), known.arch)


def show_features(
    recipe: ImageNetRecipe, options: ImageNetOptions, known: Network, student: Classifier, classes: int
) -> None:
    """Print where --overhaul takes the features of `student` and of the teacher `known`."""
    teacher, source = _build(options, known, classes, "float32", student.mean.device)
    print(f"{known.arch}: {source}\n{FeatureLoss(student, teacher, (recipe.arch, known.arch))}")


def load_weights(
    network: nn.Module, known: Network, named: str | None, classes: int, flag: str = "--teacher-checkpoint"
) -> str:
    """Load the file `named`, or the published weights. Returns what they are called. `flag`: that names a file."""
    if named == RANDOM:
        print(f"warning: {flag} {RANDOM}: {known.arch} has random weights, and knows nothing")
        return "random weights"
    if named:
        checkpoint.apply_weights(network, known.adapt(on_main(checkpoint.load_weights)(Path(named))), named)
        return named
    if classes != CLASSES:
        raise UserError(
            f"the published {known.arch} knows {CLASSES} classes, the data has {classes}: "
            f"train one on it, and name that by {flag} FILE"
        )
    weights = known.adapt(fetch(known, f"or name them by {flag} FILE"))
    checkpoint.apply_weights(network, weights, f"the published {known.arch}")
    return "its published weights"
