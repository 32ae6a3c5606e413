"""A kind of images as a run needs it: where images come from, how networks for them are built.

cifar10/task.py and imagenet/task.py implement it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from distill.config.recipe import Options, Recipe
from distill.data.datasets import Images, TestData, TrainingData
from distill.errors import UserError
from distill.features.loss import FeatureLoss, find_points
from distill.files import checkpoint
from distill.losses.overhaul import Overhaul
from distill.models.class_order import ClassNames
from distill.models.classifier import Classifier, InputSpec
from distill.models.network import Network, load_into
from distill.models.probe import check_size
from distill.models.weights import Weights, warn_of_origin
from distill.parallel.devices import choose_teacher_precision, start
from distill.parallel.processes import on_main
from distill.run.directory import CHECKPOINTS
from distill.run.identity import identify
from distill.run.paths import find_directory
from distill.run.run import Run
from distill.teacher.ensemble import Ensemble, load_members
from distill.teacher.report import TeacherReport, agreement, introduce, near_chance
from distill.teacher.store import Encoding
from distill.teacher.teacher import Teacher
from distill.training.engine import Fitted
from distill.training.evaluation import to_evaluate
from distill.training.objectives import check_loss
from distill.training.stop import Diverged
from distill.training.wrap import check_batch_norm, check_machine

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
AnyOptions = TypeVar("AnyOptions", bound=Options)


class Task(ABC, Generic[AnyRecipe, AnyOptions]):
    """The images of a run, and the networks for them.

    Making one chooses the device, resolves the names of networks, loads the images and prints what they are. Use as a
    context manager: it may hold processes that decode.
    """

    decoder = ""  # that makes pixels of files, where it is part of what a network sees
    data: Images
    taught_by: str | None = None  # digest of the weights that taught, where there is no run that says so

    def __init__(self, recipe: AnyRecipe, options: AnyOptions, images: Images | None = None) -> None:
        """Loads the images of `options`, unless `images` are given. Raises UserError."""
        self.device = start(options.device, deterministic=options.deterministic)
        self.options = options
        self.recipe = self.resolve(recipe)
        self.data = images or self.load_data()
        if not images:
            print(self.data)

    def __enter__(self) -> "Task[AnyRecipe, AnyOptions]":
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes what is open."""
        self.close()

    # ----------------------------------------------------------------------------------- what differs between the kinds
    @abstractmethod
    def resolve(self, recipe: AnyRecipe) -> AnyRecipe:
        """Returns the recipe with networks named as in files. Raises UserError for an unknown name."""

    @abstractmethod
    def load_data(self) -> Any:
        """Returns the images that the options name. Raises UserError."""

    @abstractmethod
    def prepare(self, spec: InputSpec) -> tuple[TrainingData, Mapping[str, TestData]]:
        """Returns the training data for a student of `spec`, and by name what each epoch is evaluated on.

        `test` is always there, `val` if training images are held out. Raises UserError.
        """

    @abstractmethod
    def test_data(self, spec: InputSpec, split: str = "test", batch_size: int | None = None) -> TestData:
        """Returns the images of a split, `test` or `train`, as a network of `spec` is evaluated on them."""

    @abstractmethod
    def read_files(self, files: Sequence[str], spec: InputSpec) -> Iterator[Tensor]:
        """Yields the images of `files` as a network of `spec` is evaluated on them, in parts uint8 (B, H, W, 3).

        Raises BrokenImage, with files of the next part and perhaps later ones.
        """

    @abstractmethod
    def build(self, options: AnyOptions) -> tuple[Classifier, str | None]:
        """Returns the student as it is before training, and the digest of the weights it was given, if any."""

    @abstractmethod
    def find(self, arch: str) -> Network:
        """Returns a network by its name, as the recipe's flags for the student want it."""

    @abstractmethod
    def find_trained(self, arch: str, weights: Weights | None) -> Network:
        """Returns a network at the size and with the normalisation that its `weights` were trained with."""

    @abstractmethod
    def class_names(self, weights: Weights) -> ClassNames:
        """Returns the classes of the data, as they are compared with those of `weights`."""

    @abstractmethod
    def teacher_network(self) -> Network:
        """Returns the network of the first teacher, whatever its weights are."""

    @abstractmethod
    def find_teacher(self, recipe: AnyRecipe, options: AnyOptions, run: Run | None) -> tuple[Network, Weights | None]:
        """Returns the one teacher of `recipe` with its weights, None if they are random.

        run: the run that it is for; where there are no weights yet the teacher is trained first. None: it is not.
        """

    def published(self, network: Network, flag: str) -> Weights:
        """Returns the published weights of `network`. Raises UserError; `flag` names a file in their place."""
        raise UserError(f"{network.arch} has no published weights for these images: name a file by {flag}")

    def adopt(self, run: Run) -> None:
        """Takes the images for those of `run` if only files have changed that it found broken."""

    def survey(self, training: TrainingData, tests: Mapping[str, TestData]) -> None:
        """Looks at files that are read while it trains. Raises BrokenImage."""

    def enlarged(self, spec: InputSpec) -> str:  # noqa: ARG002
        """Returns `, at 96 pixels` where a network of `spec` sees the images enlarged, else nothing."""
        return ""

    def preparation(self, spec: InputSpec) -> dict[str, Any]:
        """Returns how an image file becomes what a network of `spec` sees: fields of an exported file's Description."""
        return {"size": spec.size, "resized": spec.resized, "interpolation": spec.interpolation}

    def suggest_normalisation(self, network: Classifier, accuracy: float, who: str, *flags: str) -> None:
        """Prints how a network does with other normalisations, if its file does not tell one and it does badly."""

    def comment(self, teacher: Teacher, weights: Weights | None, report: TeacherReport, options: AnyOptions) -> None:
        """Prints what there is to say of a teacher beside what it scores."""

    def close(self) -> None:
        """Ends what works beside this process."""

    # ------------------------------------------------------------------------------------------------------ what is one
    def build_student(self) -> Classifier:
        """Returns the student as it is before training; with --evaluate, as it is in the checkpoint to evaluate."""
        student, digest = self.build(to_evaluate(self.options, self.recipe, self.data))
        student.init_digest = digest
        return student

    def build_classifier(self, network: Network, weights: Weights | None, precision: torch.dtype) -> Classifier:
        """Returns `network` for the classes of the data, with `weights`; None are random ones."""
        torch.manual_seed(0)  # of random weights
        built = network.build(num_classes=len(self.data.classes))
        classifier = Classifier(built, network.spec, precision, self.data.classes)
        if weights:
            load_into(classifier, weights, network, self.class_names(weights))
        return classifier.to(self.device)

    def load_teachers(self, run: Run | None) -> Ensemble:
        """Returns the frozen teachers of the run, with what they score; both are printed. Raises UserError.

        None is no run: no teacher is trained then.
        """
        labels = self.test_data(self.teacher_network().spec).labels
        return load_members(self.recipe, self.options, partial(self.load_teacher, run=run), labels)

    def load_teacher(
        self, recipe: AnyRecipe, options: AnyOptions, run: Run | None = None
    ) -> tuple[Teacher, TeacherReport]:
        """Returns the one frozen teacher of `recipe`, and what it scores on the test images; both are printed.

        A run goes on with the precision that --teacher-precision auto meant when it began.
        """
        network, weights = self.find_teacher(recipe, options, run)
        if not weights and options.teacher_checkpoint != "none":
            raise UserError(
                f"{network.arch} has no finished run on {self.data.name}: train it, or name its weights by "
                "--teacher-checkpoint FILE"
            )
        warn_of_origin(weights, recipe.val_split, "teacher")
        precision = recipe.teacher_precision
        if run and precision == "auto":
            precision = run.recorded("teacher_precision") or "auto"
        teacher = self.build_teacher(network, weights, precision)
        cache_key = checkpoint.digest([self.data.digest, self.decoder, str(network.spec), network.arch])
        title = f"{network.arch} from {weights.title if weights else 'random weights'}{self.enlarged(network.spec)}"
        test, cache = self.test_data(network.spec), CHECKPOINTS / "cache" / "teachers"
        report = introduce(teacher, test, cache_key, title, cache)
        self.comment(teacher, weights, report, options)
        return teacher, report

    def build_teacher(self, network: Network, weights: Weights | None, precision: str) -> Teacher:
        """Returns the frozen teacher."""
        classifier = self.build_classifier(network, weights, choose_teacher_precision(precision, self.device))
        check_size(classifier, network.arch, "--teacher-image-size")
        return Teacher(classifier, self.options.device)

    def check_student(self, student: Classifier) -> None:
        """Raises UserError for what cannot be trained, before hours are spent on a teacher."""
        check_batch_norm(student, self.recipe.arch, self.recipe, self.options.device)
        check_machine(self.device, self.recipe, self.options.device)
        check_loss(self.recipe, getattr(self.data, "labelled", True))
        Encoding(len(self.data.classes), self.recipe.top_k)  # which knows how large K may be
        if self.options.resume:
            on_main(checkpoint.load)(Path(self.options.resume))
        if self.recipe.features:
            find_points(student, self.recipe.arch, self.recipe.features)
            network = self.teacher_network()
            with torch.random.fork_rng(devices=[]):
                built = network.build(num_classes=len(self.data.classes))
            find_points(Classifier(built, network.spec), network.arch, self.recipe.features)

    def show_features(self, student: Classifier) -> None:
        """Prints where --features takes the features of student and teacher, those of overhaul without it."""
        if len(self.recipe.teacher_archs) > 1:
            raise UserError("--show-features takes one teacher")
        network, weights = self.find_teacher(self.recipe, self.options, None)
        teacher = self.build_teacher(network, weights, "float32")
        source = weights.title if weights else "random weights (--teacher-checkpoint FILE shows the margins of others)"
        names, method = (self.recipe.arch, network.arch), self.recipe.features or Overhaul()
        print(f"{network.arch}: {source}\n{FeatureLoss(student, teacher, names, method)}")


@contextmanager
def open_run(
    task: Task[Any, Any],
    student: Classifier,
    data: TrainingData,
    tests: Mapping[str, TestData],
    load_teachers: Callable[[Run], Ensemble] | None = None,
) -> Iterator[tuple[Run, Ensemble | None]]:
    """Takes hold of the run of `task` and `student`, and loads its teachers.

    The result of a finished run is printed, and is its `summary`; then there may be no teachers. Another run than the
    one in the directory is refused before a teacher is loaded or trained, and once more with it.
    Raises UserError, and BrokenImage for images that cannot be decoded.
    """
    recipe, options = task.recipe, task.options
    path = find_directory(options, recipe, task.data.name, task.data.digest)
    with Run(path, recipe, options) as run:
        task.adopt(run)
        run.facts, teachers = identify(task.data, student.init_digest, options.device), None
        if not on_main(run.load_summary)(recipe.epochs):
            task.survey(data, tests)  # a broken file is told as such, not as another set of images
        run.check()
        if not (load_teachers and options.teacher_checkpoint):  # that file may be of another teacher
            run.report()
        if load_teachers and not run.summary:
            teachers = load_teachers(run)
            run.facts |= teachers.facts
            run.check()
            run.report()
        if not run.summary:
            print(f"run: {run.path}")
            run.record_start(task.device)
        try:
            yield run, teachers
        except Diverged as error:
            run.record_divergence(student, error.step, **_content(task))
            raise


def results(
    task: Task[Any, Any],
    fitted: Fitted,
    data: TrainingData,
    teachers: Ensemble | None = None,
    top_k_error: float | None = None,
) -> dict[str, Any]:
    """Returns what a summary says of a run that is at its end; with `teachers` also how the student compares to them.

    Raises RuntimeError if a teacher has changed.
    """
    named = {**fitted.to_dict(), **_content(task)}
    named["views"] = data.plan.order.view_count or task.recipe.epochs
    classes = len(task.data.classes)
    learned = fitted.records[-1].get("train_accuracy") or 0.0
    if near_chance(fitted.test.accuracy, classes) and not near_chance(learned, classes):
        print(
            "note: the student does well on training images, and not on test images: in a short run BatchNorm's "
            "running statistics stay behind. More --epochs, or --bn-momentum 0.3, may help"
        )
    if not teachers:
        return named
    teachers.check_untouched()
    report = teachers.report
    named |= {"teacher_accuracy": report.accuracy, "teacher_precision": report.precision, "top_k_error": top_k_error}
    return {**named, "agreement": agreement(fitted.test.predictions, report.logits.argmax(1))}


def _content(task: Task[Any, Any]) -> dict[str, str]:
    content = getattr(task.data, "content", None)  # digest of small images whatever their order
    return {"data_content": content} if content else {}
