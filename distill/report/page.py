"""The page: everything that a report says, in one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.report import figures, measures
from distill.report.facts import described, result_table
from distill.report.figures import Line, shortened
from distill.report.networks import Reported, Student

if TYPE_CHECKING:
    from jinja2 import Template

MATRIX = 20  # classes up to which a confusion matrix is shown, and accuracies of all of them
ERRORS = 24
SPACE = "\N{NO-BREAK SPACE}"
CURVES = {  # key of a record -> title; the parts of the loss stand behind the first
    "train_loss": "training loss, nats",
    "test_accuracy": "test accuracy, percent",
    "test_top5": "test top-5 accuracy, percent",
    "val_accuracy": "accuracy on the validation part, percent",
    "raw_test_accuracy": "test accuracy of the weights without average, percent",
    "lr": "learning rate",
    "images_per_second": "training images a second",
}
TOTALS = ("train_loss", "train_accuracy", "train_top5")  # train_...: other keys are parts of the loss


@dataclass(frozen=True)
class Report:
    """What a page is made from.

    data: a line on the test images. networks: those that were named, then teachers found for them. students: those with
    a teacher, or none. shown: the network whose mistakes are shown. pictures: of measures.confident_errors(shown's
    predictions, ERRORS), data URIs.
    """

    data: str
    classes: tuple[str, ...]
    networks: tuple[Reported, ...]
    students: tuple[Student, ...]
    shown: Student
    pictures: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many test images there are."""
        return len(self.shown.network.predictions.labels)

    @property
    def drawn_from(self) -> int:
        """The images that a bin of the reliability diagram has at least."""
        return max(1, min(10, self.images // 20))

    @property
    def lines(self) -> dict[str, Line]:
        """The line of each network in figures, by its name."""
        return {network.name: Line(network.name, k) for k, network in enumerate(self.networks)}

    @property
    def compared(self) -> list[Reported]:
        """The networks whose classes stand beside each other: the student, its teacher, and it alone."""
        student = self.shown.network
        beside = [network for network in (self.shown.teacher, self.shown.alone) if network]
        return [student, *(beside or [network for network in self.networks if network is not student][:2])]


def render(report: Report) -> str:
    """Returns the page as HTML; what a run names is escaped."""
    from markupsafe import Markup

    drawn = {name: [Markup(figures.to_svg(one)) for one in some.values()] for name, some in draw(report).items()}
    lines, calibrated = report.lines, report.networks
    trained = [n for n in report.networks if n.trained and n.trained.records]
    notes = [f"{n.name}: {note}" for n in report.networks for note in n.notes]
    return _template().render(
        title=", ".join(n.name for n in report.networks[:4]) + (" and others" if len(report.networks) > 4 else ""),
        data=report.data,
        light=figures.palette(figures.LIGHT),
        dark=figures.palette(figures.DARK),
        series=len(figures.SERIES),
        result=result_table(report.networks, report.students, len(report.classes)),
        notes=[*notes, *(note for student in report.students for note in student.notes), *report.notes],
        runs=[described(network) for network in report.networks if network.trained],
        curves=drawn["curves"],
        curve_lines=[lines[network.name] for network in trained],
        bars={
            "figures": drawn["classes"],
            "lines": [lines[n.name] for n in report.compared],
            "explained": _which_classes(report),
        },
        confusion=_confusion(report),
        bins=measures.BINS,
        drawn_from=report.drawn_from,
        calibration={
            "figures": drawn["calibration"],
            "lines": [lines[n.name] for n in calibrated],
            "rows": [_calibration_row(network) for network in calibrated],
        },
        agreements=[_agreement(student) for student in report.students if student.teacher],
        errors=_errors(report),
    )


def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def draw(report: Report) -> dict[str, dict[str, Any]]:
    """Returns the matplotlib figures of the page by name, in its sections: curves, classes, calibration."""
    lines = report.lines
    records = {lines[n.name]: n.trained.records for n in report.networks if n.trained and n.trained.records}
    names = {key: None for of_run in records.values() for record in of_run for key in record}
    parts = {
        key: f"part of the training loss: {key.removeprefix('train_')}, nats"
        for key in names
        if key.startswith("train_") and key not in TOTALS
    }
    titles = {"train_loss": CURVES["train_loss"], **parts, **CURVES}
    if len(report.classes) <= 5:
        del titles["test_top5"]
    curves = {key: figures.curves(records, key, title) for key, title in titles.items()}
    shown = worst_classes(report)
    values = {lines[n.name]: _per_class(n)[shown] for n in report.compared}
    found = {lines[n.name]: measures.calibration(n.predictions) for n in report.networks}
    return {
        "curves": {key: figure for key, figure in curves.items() if figure},
        "classes": {"classes": figures.bars([report.classes[k] for k in shown], values, "accuracy of each class")},
        "calibration": {
            "reliability": figures.reliability(found, report.drawn_from / report.images),
            "confidence": figures.confidences(found),
        },
    }


def worst_classes(report: Report) -> list[int]:
    """Returns the classes whose accuracy is shown: all up to 20, else the 20 on which the student is worst."""
    accuracies = _per_class(report.shown.network)
    if len(accuracies) <= MATRIX:
        return list(range(len(accuracies)))
    known = accuracies.nan_to_num(nan=101.0)  # a class without images comes last
    return known.sort(stable=True).indices[:MATRIX].tolist()


def _per_class(network: Reported) -> Tensor:
    return measures.accuracy_per_class(_counts(network))


def _which_classes(report: Report) -> str:
    count = len(report.classes)
    if count <= MATRIX:
        return ""
    return f"Of {count:,} classes the {MATRIX} on which {report.shown.network.name} is worst."


def _counts(network: Reported) -> Tensor:
    """Returns how many images of each class (row) the network took for each other (column)."""
    found = network.predictions
    return measures.confusion(found.predictions, found.labels, found.logits.shape[1])


def _confusion(report: Report) -> dict[str, Any]:
    """Returns the matrices of all networks, or for many classes the pairs that are confused most."""
    if len(report.classes) > MATRIX:
        explained = f"The {MATRIX} pairs of classes that are confused most, in percent of the images of the class."
        pairs = [{"name": n.name, "rows": _pair_rows(n, report.classes)} for n in report.networks]
        return {"explained": explained, "matrices": [], "pairs": pairs}
    explained = "A row is a class, a column what its images were taken for: how many, and in percent of the class."
    names = [{"full": name, "short": shortened(name)} for name in report.classes]
    matrices = [{"name": n.name, "classes": names, "rows": _matrix_rows(n, names)} for n in report.networks]
    return {"explained": explained, "matrices": matrices, "pairs": []}


def _pair_rows(network: Reported, classes: Sequence[str]) -> list[tuple[str, ...]]:
    pairs = measures.confused_pairs(_counts(network), MATRIX)
    return [(classes[p.label], classes[p.predicted], f"{p.images:,}", f"{p.percent:.1f} %") for p in pairs]


def _matrix_rows(network: Reported, names: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for name, counts in zip(names, _counts(network).tolist(), strict=True):
        shares = [count / max(1, sum(counts)) for count in counts]
        cells = [
            {
                "count": f"{count:,}",
                "percent": f"{100 * share:.1f}",
                "share": f"{0.6 * share**0.5:.2f}",  # the root, so that rare mistakes are seen
            }
            for count, share in zip(counts, shares, strict=True)
        ]
        rows.append({"name": name, "cells": cells})
    return rows


def _calibration_row(network: Reported) -> tuple[str, ...]:
    found = measures.calibration(network.predictions)
    percents = (network.predictions.accuracy, 100 * found.mean_confidence, 100 * found.ece)
    return (network.name, *(f"{percent:.2f} %" for percent in percents))


def _agreement(student: Student) -> dict[str, Any]:
    assert student.teacher
    total = len(student.network.predictions.labels)
    split = measures.agreement(student.network.predictions, student.teacher.predictions)
    names = ("both right", "only the teacher right", "only the student right", "both wrong")
    rows = [(name, f"{n:,}", f"{100 * n / total:.2f} %") for name, n in zip(names, split[:4], strict=True)]
    same = f"{split.same:,} of the {total:,} images ({100 * split.same / total:.2f} %)"
    return {"student": student.network.name, "teacher": student.teacher.name, "same": same, "rows": rows}


def _errors(report: Report) -> dict[str, Any]:
    """Returns the cards of the images on which the student is most confidently wrong."""
    student, teacher = report.shown.network, report.shown.teacher
    numbers = measures.confident_errors(student.predictions, ERRORS)
    cards = []
    for number, picture in zip(numbers, report.pictures, strict=True):
        label = int(student.predictions.labels[number])
        answers = [("label", report.classes[label])]
        for who, network in (("student", student), ("teacher", teacher)):
            if network:
                answers.append((who if teacher else "answer", _answer(network, number, label, report.classes)))
        small = picture.startswith("data:image/png")
        cards.append({"picture": picture, "small": small, "label": report.classes[label], "answers": answers})
    wrong = int((student.predictions.labels != student.predictions.predictions).sum())
    explained = f"The {len(numbers)} of {wrong:,} wrong test images whose wrong answer has the largest probability."
    return {"name": student.name, "explained": explained if wrong else "No image is wrong.", "cards": cards}


def _answer(network: Reported, number: int, label: int, classes: Sequence[str]) -> str:
    """Returns `cat 98.1 % (label 1.2 %)`, of a right answer without the label."""
    probabilities = network.predictions.logits[number].softmax(0)
    answer = int(network.predictions.predictions[number])
    text = f"{classes[answer]} {100 * probabilities[answer]:.1f}{SPACE}%"
    return text if answer == label else f"{text} (label {100 * probabilities[label]:.1f}{SPACE}%)"
