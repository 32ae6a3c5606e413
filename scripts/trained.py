"""What the scripts on a finished network share: the flags that name it, and the network with its images. No torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.options import check_normalisation, option, validate
from scripts.dataset import DATASETS, Dataset

if TYPE_CHECKING:
    from distill.inference.trained import Trained
    from distill.models.classifier import Classifier
    from distill.training.task import Task


@dataclass(frozen=True)
class InputFlags:
    """Flags that say how a network sees images, and where it works."""

    class_order: str = option(
        "names",
        "whether names of classes in the file decide which output is which",
        group="network",
        choices=("names", "ignore"),
    )
    mean: str | None = option(
        None, "of pixels in [0, 1] that the network subtracts, one number or three with commas", group="network"
    )
    std: str | None = option(None, "that it divides by then", group="network")
    image_size: int | None = option(
        None,
        "pixels that one of ImageNet's networks sees (default: as it was trained)",
        group="network",
        least=16,
        most=2048,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="how")
    workers: int = option(2, "that decode images", group="how", flags=("-j",), least=0, most=256)

    def __post_init__(self) -> None:
        validate(self)
        check_normalisation(self, "mean", "std")


@dataclass(frozen=True)
class NetworkFlags(InputFlags):
    """Flags that say what a run, or a file of ours, says of itself."""

    arch: str | None = option(None, "the architecture of a file that does not name it", group="network", flags=("-a",))
    dataset: str | None = option(
        None, "small images or photos, and the networks for them", group="network", choices=tuple(DATASETS)
    )
    classes: str | None = option(
        None,
        "names of the outputs in their order, with commas between them, or a file with one a line",
        group="network",
    )
    data: str | None = option(
        None, "images: 'sample', a directory or a .npz file (default: those of the run)", group="network"
    )
    weights: str | None = option(
        None, "raw or ema, where a file holds weights and their average", group="network", choices=("raw", "ema")
    )
    skip_bad_images: bool = option(False, "leave out broken image files, up to 0.1 %% or one", group="how")


@dataclass(frozen=True)
class Named:
    """Classes where no images are loaded: what a Task has as its `data` then."""

    classes: tuple[str, ...]
    name: str = "no images"
    digest: str = ""
    counts: str = "no images"


@dataclass(frozen=True)
class Opened:
    """A trained network, on its device, and the Task of its images."""

    trained: "Trained"
    dataset: Dataset
    task: "Task[Any, Any]"
    classifier: "Classifier"
    arch: str
    data: str | None = None  # what the images were loaded from
    notes: list[str] = field(default_factory=list)


@contextmanager
def open_network(named: str, flags: NetworkFlags, *, images: bool, precision: str = "float32") -> Iterator[Opened]:
    """Finds the network that `named` is, and loads it.

    images: whether its images are needed too; otherwise its classes are enough. Raises UserError that says which flag
    a file without this knowledge needs.
    """
    from distill.inference.trained import find_trained

    with open_trained(find_trained(named, flags.weights), flags, images=images, precision=precision) as opened:
        yield opened


@contextmanager
def open_trained(
    trained: "Trained", flags: NetworkFlags, *, images: bool, precision: str = "float32"
) -> Iterator[Opened]:
    """Loads a network that was found: see open_network."""
    from distill.parallel.devices import choose_precision

    names = _classes(flags.classes)
    trained = _with_classes(trained, names, images=images)
    named, arch = trained.path, flags.arch or trained.arch
    if not arch:
        raise UserError(f"--arch is needed: {named} does not say what network it is of")
    dataset = DATASETS[flags.dataset or dataset_of(trained.recipe)]
    data, classes = flags.data or trained.started_with("data"), names or trained.weights.classes
    if images and not data and "data" not in trained.last_start:
        raise UserError(f"--data is needed: {named} does not say where its images are")
    if images and data and not flags.data and data != "sample" and not os.path.exists(data):
        raise UserError(f"the images of {named} were in {data}, which is gone: --data DIR says where they are")
    if not images and not classes and not flags.data:
        raise UserError(f"--classes or --data is needed: {named} does not name what its outputs stand for")
    # files are read as its own run read them
    decoder = trained.recipe.get("decoder")
    skips = flags.skip_bad_images or trained.last_start.get("skip_bad_images", False)
    recipe, options = settings(dataset, flags, arch, data=data, decoder=decoder, skip_bad_images=skips)
    given = None if images or not classes else Named(classes)
    if given and flags.data:
        print(f"note: the images of --data are not looked at: the classes of {named} are known")
    with dataset.open(recipe, options, given) as task:
        network = task.find_trained(arch, trained.weights)
        classifier = task.build_classifier(network, trained.weights, choose_precision(precision, task.device))
        yield Opened(trained, dataset, task, classifier, arch, data, print_notes(trained, task))


def _with_classes(trained: "Trained", classes: tuple[str, ...], *, images: bool) -> "Trained":
    """Returns `trained` with the names of --classes for its outputs, where its file has none.

    Raises UserError where the file names others, and the images have names of their own.
    """
    theirs = trained.weights.classes
    if not classes or classes == theirs:
        return trained
    if not theirs:
        return replace(trained, weights=replace(trained.weights, classes=classes))
    if images:
        raise UserError(f"--classes: {trained.path} names its outputs itself, otherwise: leave out --classes")
    return trained  # what they are called is compared with what the file calls them


def dataset_of(recipe: Any) -> str:
    """Returns the name of the kind of images that a recipe is for: only that of photos has a decoder."""
    return "imagenet" if "decoder" in recipe else "cifar10"


def settings(
    dataset: Dataset, flags: InputFlags, arch: str, *, data: str | None, decoder: str | None, skip_bad_images: bool
) -> tuple[Any, Any]:
    """Returns recipe and options of a run whose student is the network. decoder: of photos; else it is not used."""
    named = {name: getattr(flags, name) for name in ("mean", "std", "weights", "image_size")}
    if decoder and hasattr(dataset.recipe_type, "decoder"):
        named["decoder"] = decoder
    options = {name: getattr(flags, name) for name in ("workers", "class_order", "device")}
    options |= {"data": data, "skip_bad_images": skip_bad_images}
    return dataset.recipe_type(arch=arch, **named), dataset.options_type(**options)


def print_notes(trained: "Trained", task: "Task[Any, Any]") -> list[str]:
    """Prints, and returns, what a person should know of a run before its figures are used."""
    notes = [trained.unfinished] if trained.unfinished else []
    digest = (trained.config.get("facts") or {}).get("data_digest")
    if task.data.digest and digest and digest != task.data.digest:
        notes.append(f"trained on other images than these of {task.data.name}")
    for note in notes:
        print(f"note: {trained.path} is {note}" if note == trained.unfinished else f"note: {trained.path} was {note}")
    return notes


def _classes(named: str | None) -> tuple[str, ...]:
    """Returns the names of --classes. Raises UserError where they are not different names, two at least."""
    if not named:
        return ()
    names = [name.strip() for name in _listed(named) if name.strip()]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--classes must be different names, two at least, got {', '.join(names[:5]) or 'none'}")
    return tuple(names)


def _listed(named: str) -> list[str]:
    """Returns the parts of a text with commas, or the lines of the file that it names. Raises UserError."""
    if not os.path.isfile(named):
        return named.split(",")
    try:
        return Path(named).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--classes: {named} cannot be read as text in UTF-8 ({error})") from None
