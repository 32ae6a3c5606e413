"""Where the teacher of a run on photos comes from: a file, or its published weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from distill.errors import UserError
from distill.features.overhaul import FeatureLoss
from distill.features.points import find_feature_points
from distill.files import checkpoint
from distill.models import weights
from distill.models.classifier import Classifier
from distill.models.network import Network, fetch, kind_of, load_into
from distill.models.probe import check_size
from distill.models.weights import Weights
from distill.parallel.devices import choose_teacher_precision
from distill.parallel.processes import on_main
from distill.run.directory import CHECKPOINTS
from distill.teacher.ensemble import Ensemble, load_members, member_files
from distill.teacher.report import TeacherReport, introduce
from distill.teacher.teacher import Teacher
from imagenet.data import Photos, PhotoTestData
from imagenet.loader import Workers
from imagenet.models import CLASSES, class_names, find_trained
from imagenet.recipes import ImageNetOptions, ImageNetRecipe

RANDOM = "none"  # --teacher-checkpoint none: no weights at all


def find_teacher(recipe: ImageNetRecipe, options: ImageNetOptions) -> Network:
    """The network of the teacher of `recipe`, as its weights want to see photos."""
    told = load_file(options.teacher_checkpoint, recipe.teacher_weights, "--teacher-weights")
    known = find_trained(recipe.teacher_arch or "", recipe.teacher_weights, told)
    return known.shown(None, recipe.teacher_mean, recipe.teacher_std)


def find_teachers(recipe: ImageNetRecipe, options: ImageNetOptions) -> list[Network]:
    """find_teacher of each teacher of `recipe`; views are rendered for the one that sees the largest."""
    pairs = zip(recipe.teacher_archs, member_files(recipe, options), strict=True)
    return [
        find_teacher(replace(recipe, teacher_arch=arch), replace(options, teacher_checkpoint=file))
        for arch, file in pairs
    ]


def load_teachers(
    recipe: ImageNetRecipe,
    options: ImageNetOptions,
    photos: Photos,
    workers: Workers,
    device: torch.device,
    auto_precision: str | None = None,
) -> tuple[Ensemble, TeacherReport]:
    """All teachers of `recipe` by `load_teacher`, and what they know together."""

    def load(own: ImageNetRecipe, files: ImageNetOptions) -> tuple[Teacher, TeacherReport]:
        return load_teacher(own, files, find_teacher(own, files), photos, workers, device, auto_precision)

    return load_members(recipe, options, load, photos.val_labels)


def load_teacher(
    recipe: ImageNetRecipe,
    options: ImageNetOptions,
    known: Network,
    photos: Photos,
    workers: Workers,
    device: torch.device,
    auto_precision: str | None = None,
) -> tuple[Teacher, TeacherReport]:
    """The frozen teacher `known` of `recipe`, and what it knows of the validation photos, as it wants to see them.

    auto_precision: what --teacher-precision auto means, if it is settled already. Raises UserError if the weights do
    not fit the architecture or the number of classes.
    """
    precision = (auto_precision or "auto") if recipe.teacher_precision == "auto" else recipe.teacher_precision
    teacher, source = _build(recipe, options, known, photos.classes, precision, device)
    test = PhotoTestData(photos.val_files, photos.val_labels, known.spec, workers, device, recipe.decoder)
    digest = checkpoint.digest([photos.digest, test.name, str(known.spec)])
    return teacher, introduce(teacher, test, digest, f"{known.arch} from {source}", CHECKPOINTS / "cache" / "teachers")


def _build(
    recipe: ImageNetRecipe,
    options: ImageNetOptions,
    known: Network,
    classes: Sequence[str],
    precision: str,
    device: torch.device,
) -> tuple[Teacher, str]:
    torch.manual_seed(0)  # of random weights
    network = known.build(num_classes=len(classes))
    classifier = Classifier(network, known.spec, choose_teacher_precision(precision, device), classes)
    told = load_file(options.teacher_checkpoint, recipe.teacher_weights, "--teacher-weights")
    check_size(classifier, known.arch, "--render-size")
    source = load_weights(classifier, known, options.teacher_checkpoint, told, options.class_order)
    return Teacher(classifier.to(device), options.device), source


def check_feature_points(recipe: ImageNetRecipe, known: Network, student: Classifier, classes: int) -> None:
    """Raises UserError where --overhaul finds no stages in one of the networks, before anything is fetched for it."""
    if recipe.overhaul:
        find_feature_points(student, recipe.arch)
        with torch.random.fork_rng(devices=[]):
            find_feature_points(Classifier(known.build(num_classes=classes), known.spec), known.arch)


def show_features(recipe: ImageNetRecipe, options: ImageNetOptions, known: Network, student: Classifier) -> None:
    """Print where --overhaul takes the features of `student` and of the teacher `known`."""
    if len(recipe.teacher_archs) > 1:
        raise UserError("--show-features takes one teacher")
    teacher, source = _build(recipe, options, known, student.classes, "float32", student.mean.device)
    print(f"{known.arch}: {source}\n{FeatureLoss(student, teacher, (recipe.arch, known.arch))}")


def load_file(named: str | None, which: str | None, flag: str = "--weights") -> Weights | None:
    """What the file `named` holds, if a file is named. which: `raw` or `ema`, as `flag` says."""
    return on_main(weights.load)(Path(named), kind_of(which), flag) if named and named != RANDOM else None


def load_weights(
    classifier: Classifier,
    known: Network,
    named: str | None,
    told: Weights | None,
    class_order: str,
    flag: str = "--teacher-checkpoint",
) -> str:
    """Load what the file `named` holds, or the published weights. Returns what they are called. `flag`: names a
    file."""
    if named == RANDOM:
        print(f"warning: {flag} {RANDOM}: {known.arch} has random weights, and knows nothing")
        return "random weights"
    if not told and len(classifier.classes) != CLASSES:
        raise UserError(
            f"the published {known.arch} knows {CLASSES} classes, the data has {len(classifier.classes)}: "
            f"train one on it, and name that by {flag} FILE"
        )
    told = told or fetch(known, f"or name them by {flag} FILE")
    load_into(classifier, told, known, class_names(classifier.classes, class_order, told))
    return "its published weights" if told.published else told.source
