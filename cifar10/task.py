"""Small images as a run needs them, and where their teacher comes from: a file, an earlier CE run, or one made now."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar10 import models
from cifar10.classes import class_names
from cifar10.data import ImageData, load_data, prepare
from cifar10.folder import SIZE, decode_files
from cifar10.models import CIFAR_INPUT, MODELS
from cifar10.recipes import PRETRAINED_TEACHER, TEACHER
from distill.config.output import format_duration
from distill.config.recipe import Options, Recipe
from distill.data.datasets import Images, TensorData, TensorTestData
from distill.data.order import split_validation
from distill.errors import CheckpointError, OtherRunError, UserError
from distill.files import checkpoint
from distill.models import weights as files
from distill.models.class_order import ClassNames
from distill.models.classifier import Classifier, InputSpec
from distill.models.network import Network, raw_or_ema, torchvision_weights
from distill.models.weights import Weights
from distill.options import flag
from distill.parallel.devices import choose_precision
from distill.parallel.processes import on_main, world_size
from distill.run.directory import CHECKPOINTS, DIVERGED, ROOT, RunDirectory
from distill.run.identity import differing
from distill.run.paths import next_free, runs_on
from distill.run.run import Run
from distill.teacher.report import COMPARED, TeacherReport
from distill.teacher.teacher import Teacher
from distill.training.evaluation import evaluate, seconds_per_image
from distill.training.task import Task

# Options that are the student's alone, as they are when the teacher is trained.
PLAIN: dict[str, Any] = {"teacher_checkpoint": None, "init": None, "resume": None, "extend": False, "fresh": False}
PUBLISHED = ROOT / "checkpoints" / "published"  # by scripts/publish.py
WEAK = 90.0  # percent, below which a network whose normalisation is not known is tried with others
NORMALISATIONS = {  # (mean, std)
    "pytorch-cifar's": (CIFAR_INPUT.mean, CIFAR_INPUT.std),
    "CIFAR-10's": (CIFAR_INPUT.mean, (0.2470, 0.2435, 0.2616)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none (0 and 1)": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CHEAP = ("airbench94", "densenet_cifar")  # suggested in place of a big teacher
EXAMPLES = 5000  # training images from whose statistics a network may start


class SmallImages(Task[Recipe, Options]):
    """CIFAR-10, or other small images, all as one tensor."""

    data: ImageData

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        images: Images | None = None,
        *,
        train: Callable[[Recipe, Options], Any] | None = None,
    ) -> None:
        """Loads the images of `options`, unless `images` are given. Raises UserError.

        train: trains a teacher by CE where there is none.
        """
        self.train = train
        super().__init__(recipe, options, images)

    def resolve(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with networks named as in files. Raises UserError for an unknown name."""
        teachers = ",".join(map(models.resolve, recipe.teacher_archs)) or None
        return replace(recipe, arch=models.resolve(recipe.arch), teacher_arch=teachers)

    def load_data(self) -> ImageData:
        """Returns the images that the options name."""
        options = self.options
        return load_data(options.data, workers=options.workers, skip_bad_images=options.skip_bad_images)

    def prepare(self, spec: InputSpec) -> tuple[TensorData, dict[str, TensorTestData]]:  # noqa: ARG002
        """Returns the training data, and by name what each epoch is evaluated on."""
        return prepare(self.data, self.recipe, self.device)

    def test_data(self, spec: InputSpec, split: str = "test", batch_size: int | None = None) -> TensorTestData:  # noqa: ARG002
        """Returns the images of a split; training images without labels have negative ones."""
        data = self.data
        test = (data.test_images, data.test_labels)
        images, labels = (data.train_images, data.train_labels) if split == "train" else test
        return TensorTestData(images.to(self.device), labels.to(self.device), batch_size or TensorTestData.batch_size)

    def read_files(self, files: Sequence[str], spec: InputSpec) -> Iterator[Tensor]:  # noqa: ARG002
        """Yields the images of `files` in parts, as the folder of a data set is read. Raises BrokenImage."""
        return decode_files(files, self.options.workers)

    def build(self, options: Options) -> tuple[Classifier, str | None]:
        """Returns the student as it is before training, and the digest of the weights it was given, if any."""
        trained, _ = split_validation(len(self.data.train_images), self.recipe.val_split)
        examples = self.data.train_images[torch.from_numpy(trained)[evenly(len(trained), EXAMPLES)]]
        if options.init == "published":
            options = replace(options, init=str(published_file(self.recipe.arch, "--init")))
        return models.build_student(self.recipe, self.data.classes, options, self.device, examples)

    def find(self, arch: str) -> Network:
        """Returns a network by its name, as the recipe's flags for the student want it."""
        return models.find(arch, self.recipe.image_size, torchvision_weights(self.recipe.weights))

    def find_trained(self, arch: str, weights: Weights | None) -> Network:
        """Returns a network as its weights were trained, with the size and normalisation of the recipe's flags."""
        recipe = self.recipe
        named = torchvision_weights(recipe.weights)
        network = models.find_trained(models.resolve(arch), weights, recipe.image_size, named)
        return network.shown(None, recipe.mean, recipe.std)

    def class_names(self, weights: Weights) -> ClassNames:  # noqa: ARG002
        """Returns the classes of the data, as they are compared with those of `weights`."""
        return class_names(self.data.classes, self.options.class_order)

    def enlarged(self, spec: InputSpec) -> str:
        """Returns `, at 96 pixels` where a network sees the images enlarged."""
        return f", at {spec.size} pixels" if spec.size != self.data.test_images.shape[1] else ""

    def preparation(self, spec: InputSpec) -> dict[str, Any]:
        """Returns how an image file becomes what a network of `spec` sees: a square of 32 pixels, then it is enlarged.

        The whole image is, also where the network's own photos are cut.
        """
        how = {"size": spec.size, "resized": spec.size}
        if spec.size == SIZE:
            return {**how, "interpolation": "bicubic"}
        return {**how, "interpolation": spec.interpolation, "first_resized": SIZE}

    # ------------------------------------------------------------------------------------------------------ the teacher
    def teacher_network(self) -> Network:
        """Returns the network of the first teacher, whatever its weights are."""
        arch = self.recipe.teacher_archs[0]
        return models.find(arch, None if arch in MODELS else self.recipe.teacher_image_size)

    def find_teacher(self, recipe: Recipe, options: Options, run: Run | None) -> tuple[Network, Weights | None]:
        """Returns the one teacher of `recipe` with the weights of --teacher-checkpoint, or of its own CE run.

        run: the run that it is for; where there are no weights yet the teacher is trained first. None: it is not.
        Raises UserError.
        """
        arch = recipe.teacher_arch or ""
        if raw_or_ema(recipe.teacher_weights) and not options.teacher_checkpoint:
            raise UserError("--teacher-weights raw and ema are of a file: give --teacher-checkpoint FILE")
        if arch in MODELS and recipe.teacher_image_size not in (None, CIFAR_INPUT.size):
            if all(other in MODELS for other in self.recipe.teacher_archs):
                raise UserError(f"--teacher-image-size is for ImageNet's networks: {arch} sees {SIZE}x{SIZE} images")
            recipe = replace(recipe, teacher_image_size=None)  # it is that of the others
        named = torchvision_weights(recipe.teacher_weights)
        if named and arch in MODELS:
            raise UserError(f"--teacher-weights {named} is a name for ImageNet's networks: {arch} has none of it")
        path = find_file(arch, options) or self._trained(recipe, run)
        weights = on_main(files.load)(path, raw_or_ema(recipe.teacher_weights), "--teacher-weights") if path else None
        network = models.find_trained(arch, weights, recipe.teacher_image_size, named)
        return network.shown(None, recipe.teacher_mean, recipe.teacher_std), weights

    def comment(self, teacher: Teacher, weights: Weights | None, report: TeacherReport, options: Options) -> None:
        """Prints on which data published weights were trained, and what may better the teacher of an unknown file."""
        if weights and options.teacher_checkpoint == "published":
            published = on_main(checkpoint.load)(Path(weights.source))
            if published["data_content"] != self.data.content:
                trained_on = f"was trained on {published['data']['name']}, not on {self.data.name}"
                print(f"note: the published {published['arch']} {trained_on}")
        if weights and not weights.spec:
            flags = ("--teacher-mean", "--teacher-std")
            self.suggest_normalisation(teacher.network, report.accuracy, "teacher", *flags)

    def suggest_normalisation(self, network: Classifier, accuracy: float, who: str, *flags: str) -> None:
        """Prints how a network of a file that does not tell its normalisation does with others, if it does badly."""
        if accuracy < WEAK:
            print(f"{who}: {compare_normalisations(network, self.test_data(network.spec), *flags)}")

    def _trained(self, recipe: Recipe, run: Run | None) -> Path | None:
        """Returns the checkpoint of the teacher's own CE run on this data.

        Without `run` None if that run is not finished; else it is finished first, and what may surprise is printed.
        """
        if not self.data.labelled:
            if run is None:
                return None
            raise UserError(
                "the training images have no labels to train a teacher with: give --teacher-checkpoint FILE"
            )
        expected = teacher_recipe(recipe)
        digest = (run.first_images() if run else None) or self.data.digest
        known = run.recorded("teacher_digest") if run else self.taught_by
        wanted = known if len(self.recipe.teacher_archs) == 1 else None  # else it is of all of them together
        path, actual = _find_run(expected, self.data.name, digest, wanted)
        own_run = RunDirectory(path)
        finished = on_main(own_run.load_summary)(actual.epochs) is not None
        if run is None:
            return path / checkpoint.LAST if finished else None
        if path.parent.parent.name != self.data.name:
            print(f"note: {path} is on these images, under another name of theirs")
        if changed := differing(expected.to_dict(), actual.to_dict()):
            what = ", ".join(f"{flag(key)} {getattr(actual, key)} for {getattr(expected, key)}" for key in changed)
            print(f"note: the teacher in {path} has a recipe of its own: {what}; --teacher-checkpoint names another")
        if not finished:
            if wanted:
                raise UserError(
                    f"{run.path} was taught by other weights than those that would be trained now: give the "
                    "--teacher-checkpoint that it was started with"
                )
            announce_training(actual, recipe.arch, self.data, self.device)
            assert self.train
            try:
                self.train(actual, replace(self.options, output=str(path), **PLAIN))
            except OtherRunError as error:
                other = UserError(
                    f"the teacher's run: {error.found}; finish it by trainCE.sh as it was begun, or name another "
                    "teacher by --teacher-checkpoint FILE"
                )
                other.already_reported = error.already_reported
                raise other from None
        return path / checkpoint.LAST


def find_file(arch: str, options: Options) -> Path | None:
    """Returns the file of --teacher-checkpoint, if it is given. Raises UserError if `published` has none for `arch`."""
    if options.teacher_checkpoint != "published":
        return Path(options.teacher_checkpoint) if options.teacher_checkpoint else None
    return published_file(arch, "--teacher-checkpoint")


def published_file(arch: str, flag: str) -> Path:
    """Returns the weights of `arch` that come with this repository. Raises UserError where there are none."""
    for path in (PUBLISHED / f"{arch}-ce.pt", PUBLISHED / f"{arch}-kd.pt"):
        if path.exists():
            return path
    archs = sorted({path.stem.rsplit("-", 1)[0] for path in PUBLISHED.glob("*.pt")})
    raise UserError(f"{flag} published: there is none of {arch}, but of {', '.join(archs) or 'nothing'}")


def evenly(total: int, count: int) -> Tensor:
    """Returns `count` places among `total` images, spread evenly, since these may come class by class; at most all."""
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)


def compare_normalisations(network: Classifier, test: TensorTestData, *flags: str) -> str:
    """Returns a line with the accuracies of `network` under the usual normalisations, and the `flags` for the best."""
    places = evenly(len(test.labels), COMPARED).to(test.images.device)
    some, given = TensorTestData(test.images[places], test.labels[places]), network.spec
    specs = {title: replace(given, mean=mean, std=std) for title, (mean, std) in NORMALISATIONS.items()}
    current = next((title for title, spec in specs.items() if spec == given), "the one that it has")
    accuracies = {}
    for title, spec in {current: given, **specs}.items():
        network.look(spec)
        accuracies[title] = evaluate(network, some).accuracy
    network.look(given)
    best = max(accuracies, key=accuracies.__getitem__)  # of equals the one that it has
    listed = ", ".join(f"{title} {accuracy:.1f} %" for title, accuracy in accuracies.items())
    line = f"the file does not tell its normalisation, {current} is taken; on {len(some.labels)} test images {listed}"
    if best == current:
        return f"{line}: none is better"
    values = [",".join(f"{value:g}" for value in side) for side in NORMALISATIONS[best]]
    return f"{line}: {flags[0]} {values[0]} {flags[1]} {values[1]} takes the best"


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe by which the teacher of `recipe` is trained if there is none."""
    arch = recipe.teacher_arch or ""
    common: dict[str, Any] = {"arch": arch, "mean": recipe.teacher_mean, "std": recipe.teacher_std}
    common |= {"val_split": recipe.val_split, "accumulate": recipe.accumulate}
    if arch in MODELS:
        lr = TEACHER.lr * recipe.batch_size / TEACHER.batch_size
        return replace(TEACHER, **common, epochs=recipe.epochs, batch_size=recipe.batch_size, lr=lr)
    usual = PRETRAINED_TEACHER
    parts = world_size() * recipe.accumulate  # that a batch is divided into, as the student's can be
    batch_size = min(max(usual.batch_size // parts, 1) * parts, recipe.batch_size)
    common |= {"image_size": recipe.teacher_image_size, "weights": torchvision_weights(recipe.teacher_weights)}
    return replace(usual, **common, batch_size=batch_size, lr=usual.lr * batch_size / usual.batch_size)


@on_main
def _find_run(expected: Recipe, data_name: str, data_digest: str, teacher_digest: str | None) -> tuple[Path, Recipe]:
    """Returns directory and recipe of the teacher's CE run on this data: a finished one, else a begun one, else new.

    Of several that are finished it is the one that has taught this run, as `teacher_digest` says, else the one of the
    `expected` recipe, else that of most epochs. Raises UserError if the begun one has diverged.
    """
    begun = []
    for run, config in runs_on(data_digest, expected.arch, "ce-*", data_name):
        try:
            recipe = Recipe.from_dict(config["recipe"])
        except UserError as error:
            print(f"note: {run.path} is left out: {error}")
            continue
        if run.has_begun():
            begun.append((run, recipe))
    finished = [(run, recipe) for run, recipe in begun if run.load_summary(recipe.epochs)]
    if begun:
        taught = [pair for pair in finished if teacher_digest and _digest_of(pair[0].path) == teacher_digest]
        same = [pair for pair in finished if not differing(expected.to_dict(), pair[1].to_dict())]
        longest = sorted(finished, key=lambda pair: pair[1].epochs, reverse=True)
        run, recipe = (taught or same or longest or begun)[0]
        if not finished and (run.path / DIVERGED).exists():
            raise UserError(
                f"the teacher's run {run.path} has diverged: train one by trainCE.sh --arch {expected.arch} with a "
                "lower --lr, and name it by --teacher-checkpoint RUN"
            )
        return run.path, recipe
    path = CHECKPOINTS / data_name / expected.arch / expected.run_name
    return next_free(path) if RunDirectory(path).has_begun() else path, expected


def _digest_of(run: Path) -> str | None:
    """Returns the digest of the weights that a run has come to, as a Teacher has it; None where they do not load."""
    try:
        return checkpoint.digest(files.load(run).state)
    except CheckpointError:
        return None


def announce_training(recipe: Recipe, student: str, data: ImageData, device: torch.device) -> None:
    """Prints that the teacher is trained first, how long that may take here, and what would be cheaper."""
    others = {arch: replace(recipe, arch=arch, image_size=None, weights=None) for arch in CHEAP}
    times = {each.arch: training_seconds(each, data, device) for each in (others | {recipe.arch: recipe}).values()}
    cheap = min(CHEAP, key=times.__getitem__)
    advice = "fewer --epochs"
    if times[cheap] < 0.7 * times[recipe.arch]:
        advice = f"--teacher-arch {cheap} --arch {student}, about {format_duration(times[cheap])}"
    print(
        f"teacher: {recipe.arch} has no finished run on {data.name}: it is trained first by CE"
        f"{' from its ImageNet weights' if recipe.pretrained else ''}, {recipe.epochs} epochs, "
        f"lr {recipe.lr:g}, batch {recipe.batch_size}, about {format_duration(times[recipe.arch])}. "
        f"Cheaper: {advice}. "
        f"Or name its weights by --teacher-checkpoint FILE{ready_teacher(recipe.arch, data.classes)}."
    )


def ready_teacher(arch: str, classes: Sequence[str]) -> str:
    """Returns the flags of a trained teacher of these classes that comes with this repository; "" if there is none."""
    for each in (arch, *CHEAP):
        path = PUBLISHED / f"{each}-ce.pt"
        try:
            if list(checkpoint.load(path)["classes"]) == list(classes):
                return f", or take trained ones by --teacher-arch {each} --teacher-checkpoint published"
        except CheckpointError:
            continue
    return ""


def training_seconds(recipe: Recipe, data: ImageData, device: torch.device) -> float:
    """Returns about how long all epochs of a recipe take here, without a teacher: some images are tried."""
    with torch.random.fork_rng(devices=[]):
        network = models.find(recipe.arch, recipe.image_size, torchvision_weights(recipe.weights))
        built = network.build(len(data.classes))
    classifier = Classifier(built, network.spec, choose_precision(recipe.precision, device)).to(device)
    count = 32 if device.type == "cpu" else 512  # a GPU has to be filled
    tried = data.test_images[:count].to(device)
    epochs = recipe.whole_epochs(network.spec.size)
    return epochs * len(data.train_images) * seconds_per_image(classifier, tried) / world_size()
