"""The page on trained networks: what it measures, whom it takes for whose teacher, and that it is whole HTML."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cifar10 import train_ce, train_kd
from cifar10.data import DEFAULT
from cifar10.recipes import RECIPES
from distill.config.output import format_duration
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.files import checkpoint
from distill.inference.predictions import Predictions
from distill.inference.trained import Trained
from distill.losses.kd_loss import KD
from distill.losses.overhaul import NoLogits, Overhaul
from distill.models.classifier import InputSpec
from distill.models.weights import Weights
from distill.report import facts, figures, measures
from distill.report.networks import Reported, Student, as_student, find_teacher
from distill.report.page import ERRORS, Report, draw, render
from distill.report.pictures import data_uri
from imagenet.recipes import STANDARD
from scripts import report
from scripts.report import ReportFlags
from tests.conftest import teacher_file

TAUGHT = Recipe(teacher_arch="resnet18", method=KD(T=4.0, w=0.9))


def predictions(classes: int, images: int = 200, seed: int = 0, right: float = 0.7) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=generator)
    found = torch.rand(images, generator=generator) < right
    logits[torch.arange(images), labels] += 5.0 * found
    logits = logits.half().float()
    return Predictions(logits, labels, logits.argmax(1))


def records(epochs: int, *, labelled: bool = True, **more: float) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "epoch": k + 1,
            "lr": 0.1 / (k + 1),
            "train_loss": 2.3 / (k + 1),
            "train_accuracy": 50.0 if labelled else None,
            "train_top5": 90.0 if labelled else None,
            "test_accuracy": 100 * k / epochs,
            "test_top5": 99.0,
            "seconds": 2.0,
            "images_per_second": 412.0,
            **more,
        }
        for k in range(epochs)
    )


def run_of(
    recipe: Recipe, path: Path = Path("/runs/student"), epochs: int = 3, digest: str | None = None, **kept: Any
) -> Trained:
    """What is known of a run of `recipe`, of which `epochs` are done."""
    start = {
        "time": "2026-01-01T00:00:00+0000",
        "argv": ["/x/cifar10/train_kd.py", "--data", "my pets"],
        "commit": "0123",
    }
    start |= {"cwd": "/home/me", "machine": {"device": "cpu, 2 threads"}, "versions": {"torch": "2.14"}}
    config = {"recipe": recipe.to_dict(), "facts": {"teacher_digest": digest}, "starts": [start]}
    summary = {"test_accuracy": 50.0, "precision": "float32", "wall_seconds": 100.0, "epochs": recipe.epochs}
    summary |= {"trained_by": recipe.trained_by, "formula": recipe.formula}
    kept.setdefault("records", records(epochs))
    return Trained(path, Weights("x", {}), config, summary if epochs == recipe.epochs else None, **kept)


def network(name: str, classes: int = 10, trained: Trained | None = None, seed: int = 0, **other: Any) -> Reported:
    arch = (trained.arch if trained else None) or "resnet18"
    return Reported(name, arch, predictions(classes, seed=seed), f"digest of {name}", 1000, trained=trained, **other)


def report_of(student: Reported, teacher: Reported | None, names: tuple[str, ...]) -> Report:
    shown = Student(student, teacher)
    wrong = measures.confident_errors(student.predictions, ERRORS)
    picture = data_uri(torch.zeros(32, 32, 3, dtype=torch.uint8))
    networks = tuple(filter(None, (student, teacher)))
    return Report("pets", names, networks, (shown,) if teacher else (), shown, (picture,) * len(wrong))


class Page(HTMLParser):
    """Reads a page as HTML: raises AssertionError where elements do not close, keeps text and what is referred to."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Page:
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    for reference in page.references:
        assert reference.startswith("data:image/") or reference.removeprefix("#") in page.ids
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[^\"]*", "", text))
    assert not re.search(f"{figures.INK}(?!;)|{figures.GRID}", text)  # colours are variables
    return page


# ------------------------------------------------------------------------------------------------------------- measures
def two_classes(confidences: list[float], right: list[bool]) -> Predictions:
    """Answers of class 0 with these probabilities."""
    logits = torch.tensor([[torch.logit(torch.tensor(p)).item(), 0.0] for p in confidences])
    labels = torch.tensor([0 if fits else 1 for fits in right])
    return Predictions(logits, labels, torch.zeros(len(right), dtype=torch.int64))


def test_expected_calibration_error_by_hand() -> None:
    """Three images of 0.95 and one of 0.62: 3/4 * |2/3 - 0.95| + 1/4 * |1 - 0.62|."""
    found = measures.calibration(two_classes([0.95, 0.95, 0.95, 0.62], [True, True, False, True]))
    assert found.ece == pytest.approx(0.75 * (0.95 - 2 / 3) + 0.25 * 0.38, abs=1e-6)
    assert found.mean_confidence == pytest.approx((3 * 0.95 + 0.62) / 4, abs=1e-6)
    assert found.share.tolist() == [0.0] * 9 + [0.25] + [0.0] * 4 + [0.75]
    assert found.accuracy[14] == pytest.approx(2 / 3)
    sure = Predictions(torch.tensor([[100.0, 0.0]]), torch.tensor([0]), torch.tensor([0]))
    assert measures.calibration(sure).ece == 0  # a confidence of 1 is in the last bin


def test_confusion_pairs_and_classes_by_hand() -> None:
    labels, answers = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1, 0, 2])
    counts = measures.confusion(answers, labels, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    percents = measures.accuracy_per_class(counts)
    assert percents[:2].tolist() == pytest.approx([100 / 3, 50.0])
    assert percents[2:].isnan().all()
    assert measures.confused_pairs(counts, 2) == [(0, 1, 2, pytest.approx(200 / 3)), (1, 0, 1, 25.0)]
    assert len(measures.confused_pairs(counts, 20)) == 3


def test_agreement_and_confident_errors_by_hand() -> None:
    labels, logits = torch.tensor([0, 0, 0, 1, 1]), torch.zeros(5, 3)
    student = Predictions(logits, labels, torch.tensor([0, 0, 1, 0, 2]))
    teacher = Predictions(logits, labels, torch.tensor([0, 1, 0, 0, 0]))
    assert measures.agreement(student, teacher) == (1, 1, 1, 2, 2)
    unsure = two_classes([0.6, 0.9, 0.7, 0.99], [False, False, False, True])
    assert measures.confident_errors(unsure, 2) == [1, 2]
    assert measures.confident_errors(unsure, 24) == [1, 2, 0]


# ------------------------------------------------------------------------------------------------- who is whose teacher
def test_a_teacher_is_known_by_its_weights() -> None:
    teacher, other = network("teacher"), network("other")
    assert find_teacher(run_of(TAUGHT, digest=teacher.digest), [other, teacher]) is teacher
    assert find_teacher(run_of(TAUGHT, digest="of another"), [other, teacher]) is None
    assert find_teacher(run_of(Recipe()), [other, teacher]) is None
    file = Trained(Path("kd.pt"), Weights("kd.pt", {}, recipe=TAUGHT.to_dict()))
    assert find_teacher(file, [other]) is other  # it does not tell, and this one is of the architecture
    taught = as_student(network("kd", trained=file), other, [])
    assert taught.notes == ("kd does not tell which weights taught it: other is taken, of its architecture",)


def test_a_teacher_that_sees_images_otherwise_than_it_taught_is_another() -> None:
    """Its accuracy, and what it agrees on, would be those of another network."""
    recipe = replace(TAUGHT, teacher_mean="0.5", teacher_std="0.5,0.4,0.3")
    spec = InputSpec(32, (0.5, 0.5, 0.5), (0.5, 0.4, 0.3))
    seen, otherwise = (network("teacher", spec=one) for one in (spec, replace(spec, mean=(0.4, 0.4, 0.4))))
    assert find_teacher(run_of(recipe, digest=seen.digest), [otherwise, seen]) is seen
    assert find_teacher(run_of(recipe, digest=seen.digest), [otherwise]) is None
    assert find_teacher(run_of(TAUGHT, digest=seen.digest), [otherwise]) is otherwise  # as it tells itself
    enlarged = network("teacher", spec=replace(spec, size=96, resized=96))
    for size, found in ((None, enlarged), (96, enlarged), (128, None)):
        taught = replace(TAUGHT, teacher_image_size=size)
        assert find_teacher(run_of(taught, digest=seen.digest), [enlarged]) is found


def test_the_images_of_a_file_are_those_of_a_run_beside_it() -> None:
    file = Trained(Path("x.pt"), Weights("x.pt", {}))
    usual, own = (replace(run_of(Recipe()), config={"starts": [{"cwd": "/a", "data": data}]}) for data in (None, "b"))
    assert report.data_beside([file]) is None
    assert report.data_beside([file, usual, own]) == str(DEFAULT)
    assert report.data_beside([file, own]) == "/a/b"


def test_several_teachers_are_their_mean() -> None:
    a, b = network("a", seed=1), network("b", seed=2)
    recipe = replace(TAUGHT, teacher_arch="resnet18,resnet18")
    mean = find_teacher(run_of(recipe, digest=checkpoint.digest([b.digest, a.digest])), [a, b])
    assert mean is not None
    assert mean.name == "mean of b + a"
    torch.testing.assert_close(mean.predictions.logits, (a.predictions.logits + b.predictions.logits) / 2)


def test_a_mean_that_was_found_is_found_again() -> None:
    mean = replace(network("mean"), arch="resnet18 + resnet18")
    assert find_teacher(run_of(replace(TAUGHT, teacher_arch="resnet18,resnet18"), digest=mean.digest), [mean]) is mean


def test_a_network_is_not_compared_with_itself_as_its_teacher() -> None:
    teacher, again = (network(name, trained=run_of(Recipe(epochs=60))) for name in ("teacher", "again"))
    taught = network("born again", trained=run_of(replace(TAUGHT, epochs=60)))
    assert as_student(taught, replace(teacher), [teacher]).alone is None
    assert as_student(taught, replace(teacher), [teacher, again]).alone is again


def measured(monkeypatch: pytest.MonkeyPatch, found: list[Trained], teacher: Reported) -> tuple[Report, int]:
    """The report of runs, each of which says something of its own, and how often `teacher` was loaded for them."""
    images, loaded = SimpleNamespace(digest="d", classes=tuple("abcdefghij"), name="pets", counts="some"), list[str]()

    @contextmanager
    def opened(trained: Trained, *_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(trained=trained, task=SimpleNamespace(data=images), dataset=None, data=None)

    def load(trained: Trained, *_: Any) -> Reported:
        loaded.append(trained.name)
        return replace(teacher, name="")

    picture = data_uri(torch.zeros(32, 32, 3, dtype=torch.uint8))
    monkeypatch.setattr(report, "open_trained", opened)
    monkeypatch.setattr(report, "examine", lambda opened, name: network(name, trained=opened.trained))
    monkeypatch.setattr(report, "mistakes", lambda _, n: (picture,) * len(measures.confident_errors(n.predictions, 24)))
    monkeypatch.setattr(report, "load_teacher", load)
    return report.measure(found, ReportFlags()), len(loaded)


@pytest.mark.parametrize("turned", [False, True])
def test_a_teacher_that_was_taught_itself(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, runs = network("teacher"), []
    for name, digest in (("student", "digest of assistant"), ("assistant", teacher.digest)):
        (tmp_path / name).mkdir()
        runs.append(run_of(TAUGHT, tmp_path / name, digest=digest))
    page, _ = measured(monkeypatch, runs[::-1] if turned else runs, teacher)
    taught_by = {student.network.name: student.teacher.name for student in page.students if student.teacher}
    assert taught_by == {"student": "assistant", "assistant": "teacher of assistant"}
    assert sorted(n.name for n in page.networks) == ["assistant", "student", "teacher of assistant"]
    assert {n.name for n in page.compared} <= page.lines.keys()


def test_two_students_of_the_same_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = replace(network("both"), arch="resnet18 + densenet40")
    recipe = replace(TAUGHT, teacher_arch="resnet18,densenet40")
    for name in ("seed0", "seed1"):
        (tmp_path / name).mkdir()
    runs = [run_of(recipe, tmp_path / f"seed{k}", digest=together.digest) for k in (0, 1)]
    page, loaded = measured(monkeypatch, runs, together)
    assert [n.name for n in page.networks] == ["seed0", "seed1", "teacher of seed0"]
    assert loaded == 1
    assert {n.name for n in page.compared} <= page.lines.keys()


def test_where_a_run_found_its_teachers() -> None:
    """Paths hold in another directory; published ones have none, and a comma separates several teachers alone."""
    for arch, given, expected in (
        ("resnet18", "a,b.pt", "/home/me/a,b.pt"),
        ("resnet18,densenet40", "a.pt,/b.pt", "/home/me/a.pt,/b.pt"),
        ("resnet18,densenet40", "published,b.pt", "published,/home/me/b.pt"),
        ("resnet18,densenet40", "published", "published"),
        ("resnet18", None, None),
    ):
        run = run_of(replace(TAUGHT, teacher_arch=arch))
        run.last_start["teacher_checkpoint"] = given  # type: ignore[index]
        assert run.started_with("teacher_checkpoint") == expected


def test_who_trained_an_unfinished_run_on_photos() -> None:
    recipe = replace(STANDARD, arch="resnet18", teacher_arch="resnet34", method=NoLogits(), features=Overhaul())
    assert facts.trained_by(run_of(recipe)) == recipe.trained_by == "features from resnet34"
    assert facts.trained_by(run_of(replace(recipe, method=KD()))) == "KD and features from resnet34"


def test_gain_is_over_the_run_of_as_many_epochs() -> None:
    short, long = (network(f"ce{n}", trained=run_of(Recipe(epochs=n)), seed=n) for n in (20, 60))
    taught = network("kd", trained=run_of(replace(TAUGHT, epochs=60)), seed=3)
    found = as_student(taught, None, [short, long, taught])
    assert (found.alone, found.notes) == (long, ())
    assert found.gain == taught.predictions.accuracy - long.predictions.accuracy
    assert found.gap is None
    assert as_student(taught, None, [short]).notes == ("kd was planned for 60 epochs, ce20 for 20",)


def test_names_and_commands(tmp_path: Path) -> None:
    argv = ["/x/cifar10/train_ce.py", "--data", "my pets"]
    assert facts.command(argv) == "python -m cifar10.train_ce --data 'my pets'"
    finished, cut = (run_of(Recipe(epochs=epochs)) for epochs in (3, 9))
    assert facts.training_time(finished) == "2 min"  # of the summary, 100 s
    assert facts.training_time(cut) == format_duration(sum(record["seconds"] for record in records(3)))
    assert facts.training_time(Trained(tmp_path, Weights("", {}))) == ""
    found = []
    for name in ("a/seed0", "b/seed0", "c/seed1", "c/seed1", "c/seed2"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        found.append(Trained(tmp_path / name, Weights("", {}), {"recipe": {"epochs": 1}}))
    assert facts.unique_names(found) == ["a/seed0", "b/seed0", "c/seed1 (3)", "c/seed1 (4)", "seed2"]


# ------------------------------------------------------------------------------------------------------------- the page
@pytest.mark.parametrize("epochs", [1, 300])
def test_curves(epochs: int) -> None:
    recipe = replace(TAUGHT, epochs=300)
    of_run = records(epochs, labelled=False, train_kd=1.0, raw_test_accuracy=40.0)
    student = network("taught", trained=run_of(recipe, epochs=epochs, records=of_run))
    made = report_of(student, network("teacher", seed=1), tuple("abcdefghij"))
    curves = draw(made)["curves"]
    titles = [figure.axes[0].get_title() for figure in curves.values()]
    assert titles[:3] == ["training loss, nats", "part of the training loss: kd, nats", "test accuracy, percent"]
    assert len(titles) == 7  # and top-5, without the average, learning rate, images/s
    (line,) = curves["train_loss"].axes[0].lines
    assert len(line.get_xdata()) == epochs
    assert (line.get_marker() == "o") == (epochs == 1)
    page = read(render(made))
    words = " ".join(page.words)
    assert ("taught (not finished: 1 of 300 epochs)" in words) == (epochs == 1)
    assert "python -m cifar10.train_kd --data 'my pets'" in words
    assert "only the teacher right" in words


def test_a_file_has_no_curves() -> None:
    file = Trained(Path("net.pt"), Weights("net.pt", {}, arch="resnet18"))
    text = render(report_of(network("net", trained=file), None, tuple("abcdefghij")))
    read(text)
    assert "<h2>Curves</h2>" not in text
    assert "<h2>Student and teacher</h2>" not in text
    assert "gap to the teacher" not in text


@pytest.mark.parametrize(("classes", "matrices"), [(2, True), (20, True), (21, False), (1000, False)])
def test_few_and_many_classes(classes: int, matrices: bool) -> None:
    names = tuple(f"class {k}" for k in range(classes))
    made = report_of(network("student", classes), network("teacher", classes, seed=1), names)
    text = render(made)
    page = read(text)
    assert (text.count('<table class="confusion">') == 2) == matrices
    assert ("Of 1,000 classes the 20 on which student is worst." in page.words) == (classes == 1000)
    assert ("top-5" in page.words) == (classes > 5)
    bars = draw(made)["classes"]["classes"]
    assert len(bars.axes[0].get_yticklabels()) == min(classes, 20)
    assert text.count('<div class="card">') == ERRORS
    assert len(text) < 3e6


def test_what_a_run_names_is_escaped() -> None:
    evil = "<b>&\"'$x$ #0072b2"
    names = (evil, "f0-16", *"cdefghij")
    trained = run_of(TAUGHT, Path(f"/runs/{evil}"))
    student = network(evil, trained=trained, notes=(f"of {evil}",))
    text = render(report_of(student, network("</style><script>", seed=1), names))
    page = read(text)
    assert "<b>" not in text
    words = [word.strip() for word in page.words]
    assert words.count(evil) > 5  # title, legends, bars, tables
    assert "f0-16" in words
    assert f"/runs/{evil}" in words


def test_no_mistake_and_a_class_without_images() -> None:
    logits = torch.eye(3)[torch.tensor([0, 1, 0, 1])] * 9
    perfect = Predictions(logits, logits.argmax(1), logits.argmax(1))
    page = read(render(report_of(replace(network("student", 3), predictions=perfect), None, ("a", "b", "c"))))
    assert "No image is wrong." in page.words


def test_a_figure_is_a_file_of_its_own(tmp_path: Path) -> None:
    """With a legend and colours in itself, the same bytes each time."""
    made = report_of(network("<student>"), network("teacher", seed=1), tuple("abcdefghij"))
    for name in ("a.svg", "b.svg"):
        figures.write_svg(draw(made)["calibration"]["reliability"], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    assert "--s0: #0072b2;" in text
    assert "&lt;student&gt;" in text
    Page(text)


def test_pictures() -> None:
    small, large = (torch.zeros(size, size, 3, dtype=torch.uint8) for size in (32, 224))
    assert data_uri(small).startswith("data:image/png;base64,")
    assert data_uri(large).startswith("data:image/jpeg;base64,")


# ----------------------------------------------------------------------------------------------------------- the script
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], r"RUN \[RUN ...\] is needed"),
        (["nowhere"], "nowhere does not exist: name a run's directory or a file of weights"),
        (["x", "--figures", __file__], f"--figures {__file__}: cannot make this directory: File exists"),
        (["x", "-o", "/nowhere/x.html"], "--output /nowhere/x.html: there is no such directory"),
    ],
)
def test_report_refuses(wrong: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        report.main(wrong)


def test_report_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="this needs the package matplotlib: pip install jinja2 matplotlib"):
        report.main(["x"])


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_report_of_runs(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions are kept; the teacher is found where the run found it, or left out; other images are refused."""
    alone, taught, page = tmp_path / "alone", tmp_path / "taught", tmp_path / "page.html"
    file = teacher_file(tmp_path / "teacher.pth")
    recipe = replace(RECIPES["student"], arch="densenet_cifar", epochs=1, batch_size=8)
    options = Options(data=str(small_npz), output=str(alone))
    train_ce.train(recipe, options)
    kd = replace(recipe, teacher_arch="densenet_cifar", method=KD())
    train_kd.train(kd, replace(options, output=str(taught), teacher_checkpoint=file))
    summary = json.loads((taught / "summary.json").read_text())
    capsys.readouterr()
    report.main([str(alone), str(taught / "last.pt"), "-o", str(page), "--figures", str(tmp_path / "figures")])
    said = capsys.readouterr().out
    assert re.search(rf"report: {page}, 0\.\d\d MB; a browser opens it: file://{page}\n", said)
    assert (tmp_path / "figures" / "reliability.svg").exists()
    words = " ".join(read(page.read_text()).words)
    assert "teacher of taught" in words
    assert f"{summary['test_accuracy']:.2f} %" in words
    same = summary["agreement"]
    assert f"They give the same answer to {same / 5:.0f} of the 20 images ({same:.2f} %)." in words
    kept = {path: path.stat().st_mtime_ns for run in (alone, taught) for path in run.glob("predictions-*.pt")}
    assert len(kept) == 2

    Path(file).unlink()
    report.main([str(taught), "-o", str(page)])
    assert f"the teacher of {taught} is left out: cannot read {file}" in capsys.readouterr().out
    assert "gap to the teacher" not in page.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    teacher_file(Path(file))  # other weights under the old name
    report.main([str(taught), "-o", str(page)])
    assert "is left out: the weights that taught it are not where they were" in capsys.readouterr().out

    arrays = dict(np.load(small_npz))
    np.savez(tmp_path / "other.npz", **{**arrays, "test_images": 255 - arrays["test_images"]})
    elsewhere = shutil.copytree(alone, tmp_path / "elsewhere")
    config = json.loads((elsewhere / "config.json").read_text())
    config["starts"][-1]["data"] = str(tmp_path / "other.npz")
    (elsewhere / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"elsewhere is of other, 40 training, 20 test images, not of small, .* a report is of one data set",
    ):
        report.main([str(alone), str(elsewhere), "-o", str(page)])
