"""Where the teacher of a CIFAR run comes from: a file, an earlier CE run, or a CE run made now."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cifar10.classes import class_names
from cifar10.data import ImageData
from cifar10.models import CIFAR_INPUT, MODELS, find, find_trained
from cifar10.recipes import PRETRAINED_TEACHER, TEACHER
from distill.config.recipe import Options, Recipe
from distill.data.datasets import TensorTestData
from distill.errors import UserError
from distill.features.overhaul import FeatureLoss
from distill.features.points import find_feature_points
from distill.files import checkpoint
from distill.models import weights
from distill.models.classifier import Classifier
from distill.models.network import kind_of, load_into, theirs
from distill.models.probe import check_size
from distill.models.weights import Weights
from distill.options import flag
from distill.parallel.devices import choose_precision, choose_teacher_precision
from distill.parallel.processes import on_main
from distill.run.directory import CHECKPOINTS, ROOT, RunDirectory, differing, next_free, runs_on
from distill.teacher.ensemble import Ensemble, load_members
from distill.teacher.report import COMPARED, TeacherReport, introduce
from distill.teacher.teacher import Teacher
from distill.training.evaluation import evaluate, seconds_per_image

# Options that are the student's alone, as they are when the teacher is trained.
PLAIN: dict[str, Any] = {"teacher_checkpoint": None, "init": None, "resume": None, "extend": False, "fresh": False}
CACHE = CHECKPOINTS / "cache" / "teachers"
PUBLISHED = ROOT / "checkpoints" / "published"  # by scripts/publish.py
WEAK = 80.0  # percent, below which a teacher whose normalisation is not known is shown others
NORMALISATIONS = {  # (mean, std)
    "pytorch-cifar's": (CIFAR_INPUT.mean, CIFAR_INPUT.std),
    "CIFAR-10's": (CIFAR_INPUT.mean, (0.2470, 0.2435, 0.2616)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none (0 and 1)": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CHEAP = ("airbench94", "densenet_cifar")  # suggested in place of a big teacher


def load_teachers(
    recipe: Recipe,
    options: Options,
    data: ImageData,
    test: TensorTestData,
    train: Callable[[Recipe, Options], Any],
    auto_precision: str | None = None,
    trained_on: str | None = None,
) -> tuple[Ensemble, TeacherReport]:
    """All teachers of `recipe` by `load_teacher`, and what they know together."""

    def load(own: Recipe, files: Options) -> tuple[Teacher, TeacherReport]:
        if len(recipe.teacher_archs) > 1 and (own.teacher_arch or "") in MODELS:
            own = replace(own, teacher_image_size=None)  # that of the others
        return load_teacher(own, files, data, test, train, auto_precision, trained_on)

    return load_members(recipe, options, load, test.labels)


def load_teacher(
    recipe: Recipe,
    options: Options,
    data: ImageData,
    test: TensorTestData,
    train: Callable[[Recipe, Options], Any],
    auto_precision: str | None = None,
    trained_on: str | None = None,
) -> tuple[Teacher, TeacherReport]:
    """The frozen teacher of `recipe`, trained first by `train` if there is none yet, and what it knows, both printed.

    auto_precision: what --teacher-precision auto means, if it is settled already. trained_on: the digest of the images
    that its own run was made on, if that are not `data`.

    Raises UserError if the weights do not fit the architecture or the number of classes.
    """
    assert recipe.teacher_arch
    if kind_of(recipe.teacher_weights) and not options.teacher_checkpoint:
        raise UserError("--teacher-weights raw and ema are of a file: give --teacher-checkpoint FILE")
    device = test.images.device
    path = named(recipe.teacher_arch, options) or _trained(recipe, options, data, test, train, trained_on)
    precision = (auto_precision or "auto") if recipe.teacher_precision == "auto" else recipe.teacher_precision
    teacher, given = _build(recipe, path, data.classes, precision, device, options)
    if options.teacher_checkpoint == "published":
        taught = on_main(checkpoint.load)(path)
        if taught["data_content"] != data.content:
            print(
                f"note: the published {recipe.teacher_arch} was trained on {taught['data']['name']}, not on {data.name}"
            )
    digest = checkpoint.digest([data.digest, str(teacher.network.spec)])
    size = teacher.network.spec.size
    enlarged = f", at {size} pixels" if size != test.images.shape[1] else ""
    known = introduce(teacher, test, digest, f"{recipe.teacher_arch} from {path}{enlarged}", CACHE)
    if given and not given.spec and known.accuracy < WEAK:
        print(f"teacher: {compare_normalisations(teacher.network, test, '--teacher-mean', '--teacher-std')}")
    return teacher, known


def compare_normalisations(network: Classifier, test: TensorTestData, *flags: str) -> str:
    """A line with the accuracy of `network` on some test images under the usual normalisations, and the `flags` for the
    best of them."""
    step = -(-len(test.labels) // COMPARED)  # images may come class by class
    some, own = TensorTestData(test.images[::step], test.labels[::step]), network.spec
    looks = {title: replace(own, mean=mean, std=std) for title, (mean, std) in NORMALISATIONS.items()}
    ours = next((title for title, look in looks.items() if look == own), "the one that it has")
    found = {}
    for title, look in {ours: own, **looks}.items():
        network.look(look)
        found[title] = evaluate(network, some).accuracy
    network.look(own)
    best = max(found, key=found.__getitem__)  # of equals the one that it has
    listed = ", ".join(f"{title} {accuracy:.1f} %" for title, accuracy in found.items())
    line = f"the file does not tell its normalisation, {ours} is taken; on {len(some.labels)} test images {listed}"
    if best == ours:
        return f"{line}: none is better"
    values = [",".join(f"{value:g}" for value in side) for side in NORMALISATIONS[best]]
    return f"{line}: {flags[0]} {values[0]} {flags[1]} {values[1]} takes the best"


def named(arch: str, options: Options) -> Path | None:
    """The file of --teacher-checkpoint, if it is given. Raises UserError where `published` has none for `arch`."""
    if options.teacher_checkpoint != "published":
        return Path(options.teacher_checkpoint) if options.teacher_checkpoint else None
    for path in (PUBLISHED / f"{arch}-ce.pt", PUBLISHED / f"{arch}-kd.pt"):
        if path.exists():
            return path
    known = sorted({path.stem.rsplit("-", 1)[0] for path in PUBLISHED.glob("*.pt")})
    raise UserError(f"--teacher-checkpoint published: there is none of {arch}, but of {', '.join(known) or 'nothing'}")


def _build(
    recipe: Recipe, path: Path | None, classes: Sequence[str], precision: str, device: torch.device, options: Options
) -> tuple[Teacher, Weights | None]:
    """The teacher with the weights in `path`, with random ones where there is none; and what the file holds."""
    given = on_main(weights.load)(path, kind_of(recipe.teacher_weights), "--teacher-weights") if path else None
    arch, flag_weights = recipe.teacher_arch or "", theirs(recipe.teacher_weights)
    known = find_trained(arch, given, recipe.teacher_image_size, flag_weights)
    known = known.shown(None, recipe.teacher_mean, recipe.teacher_std)
    precision_type = choose_teacher_precision(precision, device)
    classifier = Classifier(known.build(num_classes=len(classes)), known.spec, precision_type, classes)
    check_size(classifier, arch, "--teacher-image-size")
    if given:
        load_into(classifier, given, known, class_names(classes, options.class_order))
    return Teacher(classifier.to(device), options.device), given


def check_feature_points(recipe: Recipe, student: Classifier, classes: int) -> None:
    """Raises UserError where --overhaul finds no stages in one of the networks, before a teacher is trained for it."""
    if recipe.overhaul:
        arch = recipe.teacher_arch or ""
        find_feature_points(student, recipe.arch)
        with torch.random.fork_rng(devices=[]):
            known = find(arch, recipe.teacher_image_size)
            find_feature_points(Classifier(known.build(classes), known.spec), arch)


def show_features(recipe: Recipe, options: Options, student: Classifier, data: ImageData) -> None:
    """Print where --overhaul takes the features of `student` and of the teacher, and the margins of the weights that a
    run would take, of random ones where it would have to train them first."""
    arch = recipe.teacher_arch or ""
    if len(recipe.teacher_archs) > 1:
        raise UserError("--show-features takes one teacher")
    path = named(arch, options)
    if not path and data.labelled:
        run, own = _find_run(_expected(recipe), data.name, data.digest)
        path = run / checkpoint.LAST if RunDirectory(run).finished(own) else None
    teacher, _ = _build(recipe, path, data.classes, "float32", student.mean.device, replace(options, device="cpu"))
    source = path or "random weights (--teacher-checkpoint FILE shows the margins of others)"
    print(f"{arch}: {source}\n{FeatureLoss(student, teacher, (recipe.arch, arch))}")


def _trained(
    recipe: Recipe,
    options: Options,
    data: ImageData,
    test: TensorTestData,
    train: Callable[[Recipe, Options], Any],
    trained_on: str | None,
) -> Path:
    """The checkpoint of the teacher's own CE run on this data; that run is finished first where it is not."""
    assert recipe.teacher_arch
    if not data.labelled:
        raise UserError("the training images have no labels to train a teacher with: give --teacher-checkpoint FILE")
    expected = _expected(recipe)
    path, own = _find_run(expected, data.name, trained_on or data.digest)
    run = RunDirectory(path)
    if path.parent.parent.name != data.name:
        print(f"note: {path} is on these images, under another name of theirs")
    other = differing(expected.to_dict(), own.to_dict())
    if other:
        what = ", ".join(f"{flag(key)} {getattr(own, key)} for {getattr(expected, key)}" for key in other)
        print(f"note: the teacher in {run.path} has a recipe of its own: {what}; --teacher-checkpoint names another")
    if own.val_split < recipe.val_split:
        print("warning: this teacher has seen images of the validation part; what is chosen on it is too optimistic")
    if not on_main(run.finished)(own):
        _announce(own, recipe.arch, data, test)
        train(own, replace(options, output=str(run.path), **PLAIN))
    return run.path / checkpoint.LAST


def _expected(recipe: Recipe) -> Recipe:
    """The recipe by which the teacher of `recipe` is trained where there is none."""
    arch = recipe.teacher_arch or ""
    if arch not in MODELS:
        usual, batch_size = PRETRAINED_TEACHER, min(PRETRAINED_TEACHER.batch_size, recipe.batch_size)
        lr = usual.lr * batch_size / usual.batch_size
        own: dict[str, Any] = {"arch": arch, "image_size": recipe.teacher_image_size, "val_split": recipe.val_split}
        own |= {"mean": recipe.teacher_mean, "std": recipe.teacher_std, "weights": theirs(recipe.teacher_weights)}
        return replace(usual, **own, batch_size=batch_size, lr=lr)
    return replace(
        TEACHER,
        arch=arch,
        mean=recipe.teacher_mean,
        std=recipe.teacher_std,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        lr=TEACHER.lr * recipe.batch_size / TEACHER.batch_size,
        val_split=recipe.val_split,
    )


@on_main
def _find_run(expected: Recipe, data_name: str, data_digest: str) -> tuple[Path, Recipe]:
    """Directory and recipe of the teacher's CE run on this data, under any name of it: a finished one, else one that
    was begun, else new."""
    configs = runs_on(data_digest, expected.arch, "ce-*", data_name)
    found = [(run, Recipe.from_dict(config["recipe"])) for run, config in configs if run.has_begun()]
    finished = [pair for pair in found if pair[0].finished(pair[1])]
    if finished or found:
        run, own = (finished or found)[0]
        return run.path, own
    path = CHECKPOINTS / data_name / expected.arch / expected.run_name
    return next_free(path) if RunDirectory(path).has_begun() else path, expected


def _announce(recipe: Recipe, student: str, data: ImageData, test: TensorTestData) -> None:
    """Say that the teacher is trained first, how long that may take here, and what would be cheaper."""
    images = recipe.epochs * len(data.train_images)
    times = {arch: images * _seconds_per_image(arch, data, test) for arch in {recipe.arch, *CHEAP}}
    cheap = min(CHEAP, key=times.__getitem__)
    advice = "fewer --epochs"
    if times[cheap] < 0.7 * times[recipe.arch]:
        advice = f"--teacher-arch {cheap} --arch {student}, about {_duration(times[cheap])}"
    print(
        f"teacher: {recipe.arch} has no finished run on {data.name}: it is trained first by CE"
        f"{' from its ImageNet weights' if recipe.pretrained else ''}, {recipe.epochs} epochs, "
        f"lr {recipe.lr:g}, batch {recipe.batch_size}, about {_duration(times[recipe.arch])}. "
        f"Cheaper: {advice}. Or name its weights by --teacher-checkpoint FILE."
    )


def _seconds_per_image(arch: str, data: ImageData, test: TensorTestData) -> float:
    device = test.images.device
    with torch.random.fork_rng(devices=[]):
        known = find(arch)
        network = known.build(len(data.classes))
    classifier = Classifier(network, known.spec, choose_precision("auto", device)).to(device)
    return seconds_per_image(classifier, test.images[: 32 if device.type == "cpu" else 512])  # a GPU has to be filled


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"
