"""Names decide which output stands for which class: of teachers, of --init, of what is evaluated."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights

from cifar10 import task, train_ce, train_kd
from cifar10.classes import CLASSES, class_names
from cifar10.data import load_data
from cifar10.models import CIFAR_INPUT, MODELS
from cifar10.recipes import RECIPES
from distill.config.recipe import Options
from distill.errors import UserError
from distill.files import checkpoint
from distill.losses import kd_loss
from distill.models import weights
from distill.models.class_order import ClassNames, put_in_order
from distill.models.classifier import Classifier
from distill.models.network import Network, load_into
from imagenet import models as photo_models

CE = replace(RECIPES["student"], arch="densenet_cifar", epochs=1, batch_size=8, warmup=0.25)
KD = replace(CE, teacher_arch="densenet_cifar", method=kd_loss.KD(T=3.0, w=0.8))
ALIASES = dict(zip(CLASSES, ("plane", "car", *CLASSES[2:]), strict=True))


def folder(path: Path, names: dict[str, str], data: Any) -> str:
    """The images of `data` in folders called as `names` says."""
    for split in ("train", "test"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        for i, label in enumerate(labels.tolist()):
            place = path / split / names[data.classes[label]]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).save(place / f"{i:05d}.png")
    return str(path)


@pytest.fixture(scope="module")
def some() -> Any:
    """8 training and 10 test images of each of CIFAR-10's classes."""
    data = load_data("sample")
    train, test = (torch.cat([torch.arange(n) + step * k for k in range(10)]) for n, step in ((8, 200), (10, 100)))
    return replace(
        data,
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        test_images=data.test_images[test],
        test_labels=data.test_labels[test],
    )


def accuracy_of_teacher(said: str) -> float:
    (line,) = [line for line in said.splitlines() if "test accuracy" in line and line.startswith("teacher:")]
    return float(line.split("test accuracy ")[1].split()[0])


@pytest.mark.slow
def test_the_published_teacher_and_folders_in_another_order(
    home: Path, some: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """plane, car, bird, ...: sorted otherwise than CIFAR-10's names; in the stored answers, too."""
    source = folder(tmp_path / "alias", ALIASES, some)
    options = Options(data=source, teacher_checkpoint="published", output=str(tmp_path / "run"))
    recipe = replace(KD, teacher_arch="airbench94")
    train_kd.train(recipe, options)
    said = capsys.readouterr().out
    assert accuracy_of_teacher(said) > 85
    assert "has the order airplane, automobile, bird, cat, deer, ..., truck (10): its outputs are put in" in said
    (store,) = (home / "stores").iterdir()
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(recipe, replace(options, output=str(tmp_path / "ignored"), class_order="ignore", steps=1))
    assert accuracy_of_teacher(capsys.readouterr().out) < 50
    assert len(list((home / "stores").iterdir())) == 2
    segment = checkpoint.load(next(store.glob("*.pt")))
    data = load_data(source)
    found = (segment["rows"].argmax(1) == data.train_labels).double().mean()
    assert len(segment["rows"]) == len(data.train_labels)
    assert found > 0.85


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_numbered_classes_and_folders_of_numbers(some: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels 0 to 11 of an array, and folders 0, 1, 10, 11, 2: the teacher says the same of each image."""
    labels = torch.cat([some.test_labels, torch.tensor([10, 11])])
    images = torch.cat([some.test_images, some.test_images[:2]])
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "numbers.npz", **{key: value.numpy() for key, value in arrays.items()})
    data = load_data(str(tmp_path / "numbers.npz"))
    source = folder(tmp_path / "folders", {name: name for name in data.classes}, data)
    state = dict(weights.load(task.PUBLISHED / "airbench94-ce.pt").state)
    state["linear.weight"] = torch.cat([state["linear.weight"], torch.zeros(2, 256)])
    file = str(tmp_path / "teacher.pt")
    checkpoint.save(Path(file), {"student": state, "arch": "airbench94", "classes": list(data.classes)})
    accuracies = []
    for number, where in enumerate((str(tmp_path / "numbers.npz"), source)):
        options = Options(data=where, teacher_checkpoint=file, output=str(tmp_path / f"run{number}"), steps=1)
        with pytest.raises(UserError, match="stopped after 1 steps"):
            train_kd.train(replace(KD, teacher_arch="airbench94"), options)
        said = capsys.readouterr().out
        accuracies.append(accuracy_of_teacher(said))
        assert ("its outputs are put in that of the data" in said) == bool(number)
    assert accuracies[0] == accuracies[1] > 80
    found = train_ce.train(replace(CE, arch="airbench94"), Options(data=source, init=file, evaluate=True))
    assert found is not None
    assert found["accuracy"] == pytest.approx(accuracies[0], abs=2)  # in float32


def test_init_is_put_in_order_and_saved_in_it(some: Any, tmp_path: Path) -> None:
    """The student that starts from a file, and what it saves: both in the order of the folders."""
    source = folder(tmp_path / "alias", ALIASES, some)
    published = task.PUBLISHED / "airbench94-ce.pt"
    options = Options(data=source, init=str(published), output=str(tmp_path / "run"), steps=1)
    recipe = replace(CE, arch="airbench94", lr=1e-9)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(recipe, options)
    saved = weights.load(tmp_path / "run" / "last.pt")
    assert saved.classes == tuple(sorted(ALIASES.values()))
    before, after = weights.load(published).state["linear.weight"], saved.state["linear.weight"]
    order = [CLASSES.index(usual) for name in saved.classes for usual, alias in ALIASES.items() if alias == name]
    torch.testing.assert_close(after, before[order].float(), rtol=0, atol=1e-5)


def test_init_of_another_network_is_not_one_of_other_classes(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(data="sample", init=str(task.PUBLISHED / "airbench94-ce.pt"), steps=1)
    with pytest.raises(UserError, match=r"airbench94-ce.pt does not fit the architecture: it lacks .*conv3"):
        train_ce.train(replace(CE, arch="airbench96"), options)
    assert "are new" not in capsys.readouterr().out


def test_init_with_as_many_other_classes_has_a_new_last_layer(
    some: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "pets", {name: f"pet{k}" for k, name in enumerate(ALIASES)}, some)
    published = task.PUBLISHED / "airbench94-ce.pt"
    options = Options(data=source, init=str(published), output=str(tmp_path / "run"), steps=1)
    recipe = replace(CE, arch="airbench94", lr=1e-9)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(recipe, options)
    assert "linear.weight are new; --class-order ignore keeps them" in capsys.readouterr().out
    saved, given = weights.load(tmp_path / "run" / "last.pt").state, weights.load(published).state
    assert (saved["linear.weight"] - given["linear.weight"].float()).abs().max() > 0.01
    torch.testing.assert_close(saved["conv1.weight"], given["conv1.weight"].float())
    with pytest.raises(UserError, match="the data has pet0, pet1"):
        train_ce.train(recipe, replace(options, evaluate=True, output=None))


@pytest.mark.parametrize("arch", ["densenet40", "efficientnet_b0", "mobilenetv2", "airbench94", "resnet18"])
def test_the_last_layer_is_found(arch: str) -> None:
    classifier = Classifier(MODELS.build(arch, 10), CIFAR_INPUT)
    images, order = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8), torch.randperm(10).tolist()
    expected = classifier.eval()(images)[:, order]
    drawn = torch.get_rng_state()
    put_in_order(classifier, order, lambda count: MODELS.build(arch, count), "x.pt")
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.testing.assert_close(classifier(images), expected)


@pytest.mark.parametrize("arch", ["squeezenet1_0", "mobilenet_v3_small", "efficientnet-b0"])
def test_the_last_layer_of_photo_networks_is_found(arch: str) -> None:
    known = photo_models.find(arch).at(64)
    if arch == "squeezenet1_0":
        known = photo_models.find(arch)
    classifier = Classifier(known.build(num_classes=7), known.spec).eval()
    images, order = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8), [3, 1, 0, 2, 6, 5, 4]
    expected = classifier(images)[:, order]
    put_in_order(classifier, order, lambda count: known.build(num_classes=count), "x.pt")
    torch.testing.assert_close(classifier(images), expected)


def test_a_network_whose_outputs_no_last_layer_moves() -> None:
    """Refused: the numbers would be wrong."""

    class Odd(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.linear = nn.Linear(3, classes)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(images.mean((2, 3))).cumsum(1)

    with pytest.raises(UserError, match=r"x\.pt: the last layer of this network cannot be put in the data's order"):
        put_in_order(Classifier(Odd(4), CIFAR_INPUT), [1, 0, 2, 3], Odd, "x.pt")


ABC, REST = ("a", "b", "c"), CLASSES[2:]


@pytest.mark.parametrize(
    ("ours", "theirs", "order", "said"),
    [
        (ABC, ABC, None, ""),
        (ABC, ("c", "a", "b"), [1, 2, 0], "has the order c, a, b: its outputs"),
        (("a", "A"), ("A", "a"), [1, 0], "has the order A, a"),
        (("Pick up", "van"), ("pick-up", "Van"), None, ""),
        (("00", "01", "02"), ("0", "1", "2"), None, ""),
        (("auto", *REST, "plane"), CLASSES, [1, *range(2, 10), 0], "has the order airplane"),
        (("auto", *REST, "plane"), (), [1, *range(2, 10), 0], "taken to be in CIFAR-10's order"),
        (ABC, (), None, "does not name its classes: taken to be in the data's order, a, b, c"),
        (ABC, ("0", "1", "2"), None, "x.pt has numbers for its classes, taken to be those of the names in the data"),
        (("0", "1", "2"), ABC, None, "the data has numbers for its classes, taken to be those of the names in x.pt"),
        (("0", "2", "1"), ABC, [0, 2, 1], "the data has numbers for its classes"),
    ],
)
def test_orders(
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    order: list[int] | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert class_names(ours, "names").order_of(theirs, "x.pt") == order
    printed = capsys.readouterr().out
    assert said in printed if said else printed == ""
    assert class_names(ours, "ignore").order_of(theirs, "x.pt") is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (("a", "b", "d"), ABC, "x.pt knows the classes a, b, c, the data has a, b, d: .*--class-order ignore takes"),
        (("1", "2", "3"), ("0", "1", "2"), "knows the classes 0, 1, 2, the data has 1, 2, 3: .*--class-order ignore"),
        (
            ABC,
            CLASSES,
            r"airplane, automobile, bird, cat, deer, \.\.\., truck \(10\), the data has a, b, c: train.* --init x.pt",
        ),
    ],
)
def test_other_classes_are_refused(ours: tuple[str, ...], theirs: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClassNames(ours).order_of(theirs, "x.pt")


def photo_order(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[int] | None:
    """What is made of the published weights of a network of 1,000 classes, for folders of these names."""
    found: list[Any] = []
    monkeypatch.setattr("distill.models.weights.put_in_order", lambda _, order, *__: found.append(order))
    known = Network("tiny", CIFAR_INPUT, lambda num_classes: nn.Linear(2, num_classes), lambda _: {})
    told = weights.Weights("the published tiny", known.build(num_classes=1000).state_dict(), published=True)
    classifier = Classifier(known.build(num_classes=1000), CIFAR_INPUT, classes=names)
    load_into(classifier, told, known, photo_models.class_names(names, "names", told))
    return found[0] if found else None


def test_published_weights_of_photos(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """WNIDs need no word; numbers are those of ImageNet's classes, however folders of them are sorted."""
    synsets = tuple(f"n{k:08d}" for k in range(1000))
    assert photo_order(synsets, monkeypatch) is None  # others than ImageNet's
    assert "does not name its classes: taken to be in the data's order, n00000000, " in capsys.readouterr().out
    monkeypatch.setattr(photo_models, "SYNSETS", hashlib.sha256(" ".join(synsets).encode()).hexdigest())
    assert photo_order(synsets, monkeypatch) is None
    assert capsys.readouterr().out == ""
    assert photo_order(tuple(f"class {k:04d}" for k in range(1000)), monkeypatch) is None
    assert "does not name its classes: taken to be in the data's order, class 0000, " in capsys.readouterr().out
    numbers = sorted(map(str, range(1000)))
    assert photo_order(tuple(numbers), monkeypatch) == [int(number) for number in numbers]
    assert "taken to be in the order of ImageNet's classes, numbered" in capsys.readouterr().out
    folders = sorted(name.replace(" ", "_") for name in ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    order = photo_order(tuple(folders), monkeypatch)
    assert order is not None
    assert (order[folders.index("tench")], order[folders.index("great_white_shark")]) == (0, 2)
    assert "taken to be in the order of ImageNet's classes\n" in capsys.readouterr().out


def test_labels_from_one_are_named(some: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays: dict[str, Any] = {"train_images": some.train_images.numpy(), "test_images": some.test_images.numpy()}
    arrays |= {"train_labels": some.train_labels.numpy() + 1, "test_labels": some.test_labels.numpy() + 1}
    np.savez(tmp_path / "one.npz", **arrays)
    assert len(load_data(str(tmp_path / "one.npz")).classes) == 11
    assert "class 0 has no images; labels run from 1 to 10, none is 0: if 1 is the first" in capsys.readouterr().out
    stray = arrays["train_labels"] - 1
    stray[0] = 12
    np.savez(tmp_path / "one.npz", **{**arrays, "train_labels": stray, "test_labels": arrays["test_labels"] - 1})
    assert len(load_data(str(tmp_path / "one.npz")).classes) == 13
    assert "2 of 13 classes have no training images: 10, 11" in capsys.readouterr().out
    np.savez(tmp_path / "one.npz", **arrays, classes=np.array(CLASSES))
    with pytest.raises(UserError, match=r"10 classes, labels up to 10; .* if 1 is the first class, subtract 1"):
        load_data(str(tmp_path / "one.npz"))
