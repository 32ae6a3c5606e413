"""A page on a trained network, or on several beside each other: results, curves, mistakes, calibration.

    python scripts/report.py RUN [RUN ...] [-o report.html]
    python scripts/report.py checkpoints/quickstart/alone checkpoints/quickstart/taught

RUN is a run's directory, its last.pt, a published file, or a file of others with --arch and --data. The page is one
HTML file that needs no network. All networks are measured on the same test images; what they say is computed once, and
kept beside each run. The teacher of a run that was taught is found among the networks by its weights, else where the
run found it; it is not trained here. Needs jinja2 and matplotlib: pip install -e '.[report]'.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import option  # noqa: E402
from scripts.dataset import Dataset  # noqa: E402
from scripts.trained import NetworkFlags, Opened, open_trained  # noqa: E402

if TYPE_CHECKING:
    from distill.data.datasets import Images
    from distill.inference.trained import Trained
    from distill.report.networks import Reported
    from distill.report.page import Report


@dataclass(frozen=True)
class ReportFlags(NetworkFlags):
    """The flags of this script."""

    output: str = option("report.html", "the page", group="output", flags=("-o",))
    figures: str | None = option(
        None, "write the figures into this directory too, as SVG files with a legend", group="output"
    )


def main(argv: Sequence[str]) -> None:
    words = "RUN [RUN ...]"
    options, named = cli.parse_words(argv, ReportFlags(), prog="report.py", description=__doc__ or "", words=words)
    if not named:
        raise UserError(f"{words} is needed: runs or files of weights; --help shows an example")
    cli.check_file(options.output, "--output")
    from distill.report.figures import check_packages

    check_packages("jinja2", "matplotlib")
    from distill.files import checkpoint
    from distill.inference.trained import find_trained
    from distill.report.page import render

    if options.figures:
        make_directory(Path(options.figures))
    report = measure([find_trained(name, options.weights) for name in named], options)
    path = Path(options.output)
    checkpoint.write_atomically(path, render(report).encode(errors="replace"))
    if options.figures:
        write_figures(report, Path(options.figures))
    size = path.stat().st_size / 1e6
    print(f"report: {path}, {size:.2f} MB; a browser opens it: {path.resolve().as_uri()}")


def make_directory(path: Path) -> None:
    """Makes the directory of --figures, unless it is there. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figures {path}: cannot make this directory: {error.strerror}") from None


def measure(found: Sequence["Trained"], options: ReportFlags) -> "Report":
    """Returns everything that the page says of the networks. Raises UserError where their images are not the same."""
    from distill.report.facts import unique_names
    from distill.report.networks import Reported, Student, as_student, find_teacher
    from distill.report.page import Report

    names, data = unique_names(found), data_beside(found)
    taught = [k for k, trained in enumerate(found) if trained.recipe.get("teacher_arch")]
    shown, networks = (taught or [0])[0], list[Reported]()
    first, pictures, sources = None, tuple[str, ...](), list[tuple[Dataset, str | None]]()
    for k, trained in enumerate(found):
        with open_trained(trained, flags_for(trained, options, data, k, len(found)), images=True) as opened:
            first = first or opened.task.data
            if opened.task.data.digest != first.digest:
                raise UserError(
                    f"{trained.path} is of {opened.task.data.name}, {opened.task.data.counts}, not of {first.name}, "
                    f"{first.counts}: a report is of one data set, make two"
                )
            networks.append(examine(opened, names[k]))
            sources.append((opened.dataset, opened.data))
            if k == shown:
                pictures = mistakes(opened, networks[k])
    assert first
    students, further, notes = list[Student](), list[Reported](), list[str]()
    for k in taught:
        others = [other for other in networks if other is not networks[k]] + further
        teacher = find_teacher(found[k], others) or recorded_teacher(found[k], *sources[k], first, options, notes)
        if teacher and not any(teacher is other for other in others):
            teacher = replace(teacher, name=teacher.name or f"teacher of {names[k]}")
            further.append(teacher)
        students.append(as_student(networks[k], teacher, networks))
    count = f"{len(networks[0].predictions.labels):,} test images of {len(first.classes):,} classes"
    return Report(
        data=f"{first.name}, {first.counts}; measured on {count}",
        classes=first.classes,
        networks=(*networks, *further),
        students=tuple(students),
        shown=students[0] if students else as_student(networks[0], None, ()),
        pictures=pictures,
        notes=tuple(notes),
    )


def data_beside(found: Sequence["Trained"]) -> str | None:
    """Returns the images of the first of the networks that is in a run, for those in none; None where none is."""
    runs = [trained for trained in found if "data" in trained.last_start]
    if not runs:
        return None
    from cifar10.data import DEFAULT  # loads torch

    return runs[0].started_with("data") or str(DEFAULT)


def flags_for(trained: "Trained", options: ReportFlags, data: str | None, place: int, count: int) -> ReportFlags:
    """Returns the flags of one network of several: a file of ours tells itself what it sees.

    data: what is taken for a file in no run without --data. place: of the network among `count`. Raises UserError.
    """
    archs = options.arch.split(",") if options.arch else []
    if len(archs) not in (0, count):
        raise UserError(f"--arch names {len(archs)} networks, here are {count}: `--arch ,A` is of the second alone")
    told = ["mean", "std", "image_size"] if trained.weights.spec else []
    told += ["classes"] if trained.weights.classes else []
    ours: dict[str, Any] = dict.fromkeys(told if count > 1 else [])
    data = options.data or (None if trained.in_run else data)
    return replace(options, **ours, data=data, arch=(archs[place].strip() or None) if archs else None)


def examine(opened: Opened, name: str) -> "Reported":
    """Returns the network with what it says to the test images, which is kept beside its run."""
    from distill.files import checkpoint
    from distill.inference.predictions import predictions_of
    from distill.models.classifier import count_parameters
    from distill.report.networks import Reported
    from distill.run.directory import CHECKPOINTS

    classifier, trained, task = opened.classifier, opened.trained, opened.task
    test = task.test_data(classifier.spec)
    digest = checkpoint.digest([task.data.digest, task.decoder, opened.arch])
    directory = trained.directory if trained.in_run else CHECKPOINTS / "cache" / "predictions"
    predictions = predictions_of(classifier, test, digest, directory)
    print(f"{name}: {opened.arch}, test accuracy {predictions.accuracy:.2f} %")
    notes = tuple(note for note in opened.notes if note != trained.unfinished)
    parameters = count_parameters(classifier.network)
    precision = str(classifier.precision).removeprefix("torch.")
    weights = checkpoint.digest(classifier.network.state_dict())
    return Reported(name, opened.arch, predictions, weights, parameters, precision, trained, classifier.spec, notes)


def recorded_teacher(
    trained: "Trained", dataset: Dataset, data: str | None, images: "Images", options: ReportFlags, notes: list[str]
) -> "Reported | None":
    """Returns the teacher of a run from where that found it, without a name; None if it is not there, and notes why.

    images: those of `data`, as the run was given it.
    """
    try:
        return load_teacher(trained, dataset, data, images, options)
    except UserError as error:
        notes.append(f"the teacher of {trained.path} is left out: {error}")
        print(f"note: {notes[-1]}")
        return None


def load_teacher(
    trained: "Trained", dataset: Dataset, data: str | None, images: "Images", options: ReportFlags
) -> "Reported":
    """Returns the teacher of a run: see recorded_teacher. It is not trained. Raises UserError."""
    from distill.inference.predictions import Predictions
    from distill.report.networks import Reported, teacher_digest
    from distill.run.directory import CHECKPOINTS
    from distill.teacher.ensemble import joint_digest, one_by_one

    wanted = teacher_digest(trained)
    if not wanted:
        raise UserError("its file does not tell which weights taught it, and none of its architecture is given")
    facts, options_type = trained.config["facts"], dataset.options_type
    recipe = dataset.recipe_type.from_dict(dict(trained.recipe))
    recipe = replace(recipe, teacher_precision=facts.get("teacher_precision") or "auto")
    named = {name: getattr(options, name) for name in ("workers", "class_order", "device")}
    named |= {key: value for key, value in trained.last_start.items() if key in ("class_order", "skip_bad_images")}
    named |= {"kd": True} if hasattr(options_type, "kd") else {}
    file = trained.started_with("teacher_checkpoint")
    settings = options_type(data=data, teacher_checkpoint=file, **named)
    with dataset.open(recipe, settings, images) as task:
        task.taught_by = wanted
        networks = [
            (task.find_teacher(*one, None), one[0].teacher_precision) for one in one_by_one(task.recipe, settings)
        ]
        built = [task.build_teacher(*network, precision) for network, precision in networks]
        if joint_digest([teacher.digest for teacher in built]) != wanted:
            lost = f"the weights that taught it are not where they were, or not below {CHECKPOINTS}"
            raise UserError(f"{lost}: name them as well")
        teachers = task.load_teachers(None)
    logits = teachers.report.logits
    predictions = Predictions(logits, task.test_data(built[0].network.spec).labels.cpu(), logits.argmax(1))
    parameters = sum(one.parameters for one in built)
    arch, precision = " + ".join(teachers.archs), teachers.report.precision["precision"]
    return Reported("", arch, predictions, wanted, parameters, precision)


def mistakes(opened: Opened, network: "Reported") -> tuple[str, ...]:
    """Returns the pictures of the test images on which `network` is most confidently wrong, as data URIs."""
    from distill.report.measures import confident_errors
    from distill.report.page import ERRORS
    from distill.report.pictures import data_uri

    test = opened.task.test_data(opened.classifier.spec)
    numbers, count = confident_errors(network.predictions, ERRORS), len(test.labels)
    # the part of process k of N, where there are N images, is image k: no other one is read
    return tuple(data_uri(images[0]) for k in numbers for images, _ in test.batches(k, count))


def write_figures(report: "Report", directory: Path) -> None:
    """Writes the figures of the page as files: `train_loss.svg`, `classes.svg`, `reliability.svg`, ..."""
    from distill.report.figures import write_svg
    from distill.report.page import draw

    for figures in draw(report).values():
        for name, figure in figures.items():
            write_svg(figure, directory / f"{name}.svg")


if __name__ == "__main__":
    cli.run(main)
