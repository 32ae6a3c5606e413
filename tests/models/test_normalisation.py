"""What a network is shown: its own mean and deviation, by flags or by its file; and which it was, where nobody says."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar10 import task, train_ce, train_kd
from cifar10.data import load_data
from cifar10.models import CIFAR_INPUT
from cifar10.recipes import RECIPES
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.losses import kd_loss
from distill.models import weights
from distill.run.directory import RunDirectory
from imagenet import train_kd as photo_kd
from imagenet.recipes import STANDARD, ImageNetOptions
from scripts import evaluate

CE = replace(RECIPES["student"], arch="densenet_cifar", epochs=1, batch_size=8, warmup=0.25)
KD = replace(CE, teacher_arch="airbench94", method=kd_loss.KD(T=3.0, w=0.8))
HALF = {"mean": "0.5", "std": "0.5"}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The published airbench94 as of a person who showed it images by 0.5 and 0.5: its first layer makes up for it."""
    given = weights.load(task.PUBLISHED / "airbench94-ce.pt")
    state = {key: value.float() if value.is_floating_point() else value for key, value in given.state.items()}
    first = next(key for key, value in state.items() if value.dim() == 4)
    state[first] = state[first] * (0.5 / torch.tensor(CIFAR_INPUT.std)).view(1, 3, 1, 1)
    if first.replace("weight", "bias") not in state:
        pytest.fail("the first layer has no bias that could take the mean")
    shift = (torch.tensor(CIFAR_INPUT.mean) - 0.5) / 0.5
    state[first.replace("weight", "bias")] -= (state[first] * shift.view(1, 3, 1, 1)).sum((1, 2, 3))
    path = tmp_path_factory.mktemp("foreign") / "airbench.pth"
    torch.save({"net": state, "acc": 91.9, "epoch": 16}, path)
    return str(path)


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2 training and 20 test images of each of CIFAR-10's classes."""
    data, path = load_data("sample"), tmp_path_factory.mktemp("some") / "some.npz"
    train, test = (torch.cat([torch.arange(n) + step * k for k in range(10)]) for n, step in ((2, 200), (20, 100)))
    arrays = {"train_images": data.train_images[train], "train_labels": data.train_labels[train]}
    arrays |= {"test_images": data.test_images[test], "test_labels": data.test_labels[test]}
    np.savez(path, classes=np.array(data.classes), **{key: value.numpy() for key, value in arrays.items()})
    return str(path)


def said_of_teacher(capsys: pytest.CaptureFixture[str]) -> tuple[float, str]:
    said = capsys.readouterr().out
    return float(re.findall(r"test accuracy ([\d.]+) %", said)[0]), said


@pytest.mark.slow
def test_a_foreign_teacher_and_its_normalisation(
    home: Path, foreign: str, some: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shown other inputs it says what they cost, and which flags are better; with them the line is gone."""
    recipe, options = KD, Options(data=some, teacher_checkpoint=foreign, steps=1)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(recipe, options)
    accuracy, said = said_of_teacher(capsys)
    assert accuracy < task.WEAK
    (line,) = [line for line in said.splitlines() if "does not tell its normalisation" in line]
    assert "pytorch-cifar's is taken; on 200 test images pytorch-cifar's " in line
    assert all(f"{title} " in line for title in task.NORMALISATIONS)
    assert line.endswith("--teacher-mean 0.5,0.5,0.5 --teacher-std 0.5,0.5,0.5 takes the best")
    told = replace(recipe, teacher_mean="0.5", teacher_std="0.5")
    with pytest.raises(UserError, match=r"holds another run: --teacher-mean was None, is 0.5, --teacher-std"):
        train_kd.train(told, options)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(told, replace(options, output=str(tmp_path / "told")))
    accuracy, said = said_of_teacher(capsys)
    assert accuracy > 88
    assert "does not tell" not in said
    keys = [(path / "key.json").read_text() for path in (home / "stores").iterdir()]
    assert sum(re.search(r'"std": \[\s*0\.5,', key) is not None for key in keys) == 1
    assert len(keys) == 2
    config = RunDirectory(tmp_path / "told").read_config()
    assert config is not None
    assert config["recipe"]["teacher_std"] == "0.5"


@pytest.mark.slow
def test_evaluate_by_flags(foreign: str, some: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--arch", "airbench94", "--checkpoint", foreign, "--data", some]
    evaluate.main(flags)
    assert "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 takes the best" in capsys.readouterr().out
    evaluate.main([*flags, "--mean", "0.5", "--std", "0.5"])
    said = capsys.readouterr().out
    assert float(said.splitlines()[-1].split()[1]) > 88
    assert "takes the best" not in said


@pytest.mark.slow
def test_a_checkpoint_keeps_its_normalisation(small_npz: Path, tmp_path: Path) -> None:
    """So that it is seen the same way as a start, as a teacher, and where it is evaluated."""
    options = Options(data=str(small_npz), output=str(tmp_path / "run"))
    summary = train_ce.train(replace(CE, **HALF, val_split=8), options)
    assert summary is not None
    for name in ("last.pt", "best.pt"):
        told = weights.load(tmp_path / "run" / name)
        assert told.spec == replace(CIFAR_INPUT, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        assert told.classes == ("airplane", "automobile", "bird", "cat")
    file = str(tmp_path / "run" / "last.pt")
    found = train_ce.train(CE, Options(data=str(small_npz), init=file, evaluate=True))
    assert found is not None
    assert (found["accuracy"], found["loss"]) == (summary["test_accuracy"], summary["test_loss"])
    other = train_ce.train(replace(CE, mean="0", std="1"), Options(data=str(small_npz), init=file, evaluate=True))
    assert other is not None
    assert other["loss"] != found["loss"]
    train_kd.train(
        replace(KD, teacher_arch="densenet_cifar"),
        Options(data=str(small_npz), teacher_checkpoint=file, output=str(tmp_path / "kd"), store=False),
    )
    taught = RunDirectory(tmp_path / "kd").load_summary(CE.epochs)
    assert taught is not None
    assert taught["teacher_accuracy"] == summary["test_accuracy"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": "0.5"}, "--mean and --std belong together"),
        ({"teacher_std": "0.5"}, "--teacher-mean and --teacher-std belong together"),
        ({"mean": "0.5", "std": "0"}, r"--std must be one number or three .*, got '0'"),
        ({"mean": "123.7,116.3,103.5", "std": "58.4"}, "--mean must be one number or three with commas, for pixels in"),
        ({"mean": "0.5,0.5", "std": "0.5"}, "got '0.5,0.5'"),
        ({"mean": "half", "std": "0.5"}, "got 'half'"),
        ({"mean": "nan", "std": "0.5"}, "got 'nan'"),
    ],
)
def test_flags_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**given)


def test_photos(photos: Path, tmp_path: Path, home: Path) -> None:
    """The same flags for the networks of photos."""
    recipe = replace(
        STANDARD,
        arch="shufflenet_v2_x0_5",
        teacher_arch="shufflenet_v2_x0_5",
        method=kd_loss.KD(T=1.0, w=0.5),
        batch_size=8,
        image_size=32,
        render_size=32,
        epochs=1,
        mean="0.25",
        std="0.5",
        teacher_mean="0.5",
        teacher_std="0.5",
    )
    options = ImageNetOptions(data=str(photos), teacher_checkpoint="none", output=str(tmp_path / "run"), workers=0)
    photo_kd.train(recipe, options)
    told = weights.load(tmp_path / "run" / "last.pt").spec
    assert told is not None
    assert (told.size, told.mean, told.std) == (32, (0.25, 0.25, 0.25), (0.5, 0.5, 0.5))
    (store,) = (home / "stores").iterdir()
    assert re.search(r'"mean": \[\s*0\.5,', (store / "key.json").read_text())
