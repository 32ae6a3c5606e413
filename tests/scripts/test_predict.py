"""A finished network: found by what a person names, asked about images, looked at class by class."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar10 import train_ce
from cifar10.data import load_data
from distill.errors import UserError
from distill.inference.trained import find_trained
from distill.run.directory import RunDirectory
from imagenet import train_ce as train_photos
from scripts import evaluate, predict, trained
from scripts.trained import NetworkFlags, open_network
from tests.conftest import teacher_file

pytestmark = pytest.mark.usefixtures("home")
SMALL = ["--arch", "densenet_cifar", "--epochs", "2", "--batch-size", "8", "--warmup", "0"]


@pytest.fixture(scope="module")
def folder(small_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small data set as folders of PNG files."""
    data, root = load_data(str(small_npz)), tmp_path_factory.mktemp("folder") / "pets"
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = root / split / data.classes[label] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on that folder, begun from its parent directory."""
    path = tmp_path_factory.mktemp("run") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        train_ce.main([*SMALL, "--data", folder.name, "--output", str(path), "--ema", "0.5"])
    return path


def right(path: Path, root: Path) -> float:
    """Percent of the images in a --json file of predict.py whose first class is the name of their folder."""
    rows = json.loads(path.read_text())["images"]
    assert len(rows) == len(list(root.rglob("*.*")))
    hits = [row["predictions"][0]["class"] == Path(row["file"]).parent.name for row in rows]
    return 100 * sum(hits) / len(hits)


@pytest.mark.slow
def test_predictions_are_those_of_evaluation(run: Path, folder: Path, tmp_path: Path) -> None:
    predict.main([str(run), str(folder / "test"), "--json", str(tmp_path / "p.json"), "--batch-size", "7"])
    evaluate.main(["--checkpoint", str(run / "last.pt"), "--data", str(folder), "--json", str(tmp_path / "e.json")])
    assert right(tmp_path / "p.json", folder / "test") == json.loads((tmp_path / "e.json").read_text())["accuracy"]
    assert json.loads((run / "summary.json").read_text())["test_accuracy"] == right(
        tmp_path / "p.json", folder / "test"
    )


@pytest.mark.slow
def test_photos_are_prepared_as_in_evaluation(photos: Path, tmp_path: Path) -> None:
    """Also around a broken one: the others are not moved by it."""
    path = tmp_path / "run"
    flags = ["--arch", "resnet18", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--image-size", "64"]
    train_photos.main([str(photos), *flags, "--render-size", "64", "--output", str(path)])
    summary = json.loads((path / "summary.json").read_text())
    predict.main([str(path), str(photos / "val"), "--workers", "0", "--json", str(tmp_path / "p.json")])
    assert right(tmp_path / "p.json", photos / "val") == summary["test_accuracy"]
    other = ["--image-size", "96", "--workers", "0", "--json"]  # than it was trained for
    predict.main([str(path), str(photos / "val"), *other, str(tmp_path / "p.json")])
    evaluate.main([str(path), *other, str(tmp_path / "e.json")])
    accuracy = json.loads((tmp_path / "e.json").read_text())["accuracy"]
    assert right(tmp_path / "p.json", photos / "val") == accuracy
    (tmp_path / "0.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 of 9 images could not be read, 8 are answered"):
        predict.main([str(path), str(tmp_path / "0.jpg"), str(photos / "val"), "--json", str(tmp_path / "q.json")])
    assert right(tmp_path / "q.json", photos / "val") == summary["test_accuracy"]


@pytest.mark.slow
def test_what_is_printed_and_written(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((folder / "test").rglob("*.png"))
    broken, table = tmp_path / "broken.png", tmp_path / "table.csv"
    broken.write_bytes(image.read_bytes()[:60])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{image}\n\n{tmp_path}/none.png\n{broken}\n"))
    with pytest.raises(UserError, match="2 of 3 images could not be read, 1 are answered") as error:
        predict.main([str(run), "--top", "2", "-", "--csv", str(table)])
    assert error.value.exit_code == 1
    printed = capsys.readouterr()
    assert re.search(rf"^{image}  \w+ [\d.]+ %  \w+ [\d.]+ %$", printed.out, flags=re.MULTILINE)
    assert f"cannot read {broken}: " in printed.err
    assert "none.png: FileNotFoundError" in printed.err
    head, row = csv.reader(table.read_text().splitlines())
    assert head == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert row[0] == str(image)
    assert 1 >= float(row[2]) >= float(row[4]) >= 0


@pytest.mark.slow
def test_a_foreign_file_needs_its_classes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, images = teacher_file(tmp_path / "foreign.pth"), str(folder / "test")
    with pytest.raises(UserError, match="--arch is needed"):
        predict.main([file, images])
    with pytest.raises(UserError, match="--classes or --data is needed"):
        predict.main([file, images, "--arch", "densenet_cifar"])
    with pytest.raises(UserError, match="--classes must be different names"):
        predict.main([file, images, "--arch", "densenet_cifar", "--classes", "a,a"])
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\n")
    named = ["--arch", "densenet_cifar", "--classes", str(tmp_path / "names.txt"), "--top", "1"]
    predict.main([file, images, *named, "--data", "nowhere"])
    said = capsys.readouterr().out
    assert f"note: the images of --data are not looked at: the classes of {file} are known\n" in said
    by_classes = re.findall(r"png  (\w+)", said)
    predict.main([file, images, "--arch", "densenet_cifar", "--data", str(folder), "--top", "1"])
    by_data = re.findall(r"png  (\w+)", capsys.readouterr().out)
    names = dict(zip(("one", "two", "three", "four"), load_data(str(folder)).classes, strict=True))
    assert [names[name] for name in by_classes] == by_data
    assert len(by_data) == 20


@pytest.mark.slow
def test_classes_name_the_outputs_in_their_order(folder: Path, tmp_path: Path) -> None:
    """Also where they are those of the data in another order, with and without images; a file's own names stand."""
    file, names = teacher_file(tmp_path / "foreign.pth"), load_data(str(folder)).classes
    turned, image = ",".join(names[::-1]), torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    flags = NetworkFlags(arch="densenet_cifar", data=str(folder))
    with open_network(file, flags, images=True) as opened:
        plain = opened.classifier.eval()(image)
    with open_network(file, replace(flags, classes=turned), images=True) as opened:
        assert opened.classifier.classes == names
        torch.testing.assert_close(opened.classifier.eval()(image), plain.flip(1))
    ten, usual = teacher_file(tmp_path / "ten.pth", classes=10), load_data("sample").classes
    flags = NetworkFlags(arch="densenet_cifar", classes=",".join(usual[::-1]))
    with open_network(ten, flags, images=False) as opened:
        assert opened.classifier.classes == usual[::-1]
        turned_back = opened.classifier.eval()(image)
    with open_network(ten, replace(flags, classes=",".join(usual)), images=False) as opened:
        torch.testing.assert_close(opened.classifier.eval()(image), turned_back)
    own = tmp_path / "own.pth"
    torch.save({**torch.load(file, weights_only=True), "classes": list(names)}, own)
    flags = NetworkFlags(arch="densenet_cifar", data=str(folder), classes="a,b,c,d")
    with pytest.raises(UserError, match="names its outputs itself"), open_network(str(own), flags, images=True):
        pass


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufeffcat\ndog\n".encode(), ("cat", "dog")),
        ("größe\n日本\n".encode(), ("größe", "日本")),
        ("größe\nb\n".encode("latin-1"), "cannot be read as text in UTF-8"),
    ],
)
def test_a_file_of_classes(content: bytes, expected: str | tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    if isinstance(expected, tuple):
        assert trained._classes(str(file)) == expected
        return
    with pytest.raises(UserError, match=expected):
        trained._classes(str(file))


def test_many_classes_may_stand_in_the_command() -> None:
    names = tuple(f"class number {k}" for k in range(1000))  # longer than the name of a file may be
    assert trained._classes(",".join(names)) == names


def test_what_is_no_network(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text('{"recipe": {}, "facts": {}, "starts": []}')
    (tmp_path / "empty").mkdir()
    for named, match in (
        ("none", "does not exist"),
        ("empty", "is no run: it has"),
        ("begun", "has saved nothing yet"),
    ):
        with pytest.raises(UserError, match=match):
            predict.main([str(tmp_path / named), str(folder)])
    with pytest.raises(UserError, match=r"RUN IMAGE\|DIR \.\.\. are needed"):
        predict.main([str(tmp_path)])
    with pytest.raises(UserError, match="there are no images in"):
        predict.main([str(tmp_path), str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"--csv .*: there is no such directory"):
        predict.main([str(tmp_path), str(folder), "--csv", str(tmp_path / "none" / "a.csv")])


@pytest.mark.slow
def test_what_a_run_knows(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find_trained(str(run))
    assert found.arch == "densenet_cifar"
    assert found.name == "alone"
    assert not found.unfinished
    assert found.started_with("data") == str(folder)
    assert [record["epoch"] for record in found.records] == [1, 2]
    assert find_trained(str(run / "last.pt")).weights.classes == load_data(str(folder)).classes
    (tmp_path / "copy").mkdir()
    shutil.copy(run / "last.pt", tmp_path / "copy")
    assert find_trained(str(tmp_path / "copy")).weights.classes == load_data(str(folder)).classes
    average = find_trained(str(run)).weights.state
    raw = find_trained(str(run), "raw").weights.state
    assert any(not torch.equal(average[key], raw[key]) for key in raw)
    with pytest.raises(UserError, match=r"is no run: .*; runs in it are .*alone"):
        find_trained(str(run.parent))
    with open_network(str(run), NetworkFlags(), images=True) as opened:
        assert opened.notes == []
        assert opened.task.data.classes == found.weights.classes
    with open_network(str(run), NetworkFlags(data="sample", class_order="ignore"), images=False) as opened:
        assert "trained on other images" not in capsys.readouterr().out
    with (
        pytest.raises(UserError, match="--data is needed"),
        open_network(teacher_file(tmp_path / "f.pth"), NetworkFlags(arch="resnet18"), images=True),
    ):
        pass


@pytest.mark.slow
def test_a_run_of_before_does_not_know_its_images(run: Path, tmp_path: Path) -> None:
    """Its starts do not tell them: nothing is downloaded in their place."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    config = json.loads((old / "config.json").read_text())
    del config["starts"][-1]["data"]
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--data is needed"), open_network(str(old), NetworkFlags(), images=True):
        pass
    config["starts"][-1]["data"] = str(tmp_path / "moved")
    (old / "config.json").write_text(json.dumps(config))
    gone = pytest.raises(UserError, match=r"old were in .*moved, which is gone: --data DIR says where they are")
    with gone, open_network(str(old), NetworkFlags(), images=True):
        pass


@pytest.mark.slow
def test_an_unfinished_run_is_allowed_and_labelled(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut"
    with pytest.raises(UserError, match="stopped after 7 steps"):
        train_ce.main([*SMALL, "--data", str(small_npz), "--output", str(path), "--steps", "7"])
    (path / "previous.pt").write_bytes((path / "last.pt").read_bytes())
    (path / "last.pt").write_bytes(b"damaged")
    with open_network(str(path), NetworkFlags(), images=True) as opened:
        assert opened.notes == ["not finished: 1 of 2 epochs"]
    said = capsys.readouterr().out
    assert "last.pt does not load: previous.pt is taken" in said
    assert f"note: {path} is not finished: 1 of 2 epochs" in said
    evaluate.main([str(path)])
    assert f"note: {path} is not finished: 1 of 2 epochs" in capsys.readouterr().out
    assert RunDirectory(path).has_begun()


@pytest.mark.slow
def test_images_that_exif_would_turn_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (32, 32)).save(tmp_path / name, exif=exif if name == "b.jpg" else Image.Exif())
    predict.main([str(run), str(tmp_path)])
    assert "note: 1 of the first 2 images carry an EXIF orientation, which is ignored" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_each_class(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", str(run / "last.pt"), "--data", str(folder), "--json", str(tmp_path / "e.json")]
    evaluate.main([*flags, "--per-class"])
    figures = json.loads((tmp_path / "e.json").read_text())
    rows = figures["per_class"]
    assert [row["class"] for row in rows] == list(load_data(str(folder)).classes)
    assert sum(row["accuracy"] * row["images"] for row in rows) == pytest.approx(figures["accuracy"] * 20)
    assert len(re.findall(r" %  of 5 images", capsys.readouterr().out)) == 4


def test_classes_are_counted() -> None:
    rows = evaluate.by_class(torch.tensor([0, 1, 1, 2, 1]), torch.tensor([0, 0, 0, 2, 2]), ("a", "b", "c"))
    assert rows[0] == {
        "class": "a",
        "images": 3,
        "accuracy": pytest.approx(100 / 3),
        "taken_for": "b",
        "mistaken": pytest.approx(200 / 3),
    }
    assert rows[1] == {"class": "b", "images": 0, "accuracy": None, "taken_for": None, "mistaken": 0.0}
    assert rows[2]["accuracy"] == 50.0
