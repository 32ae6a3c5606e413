"""What the tests share: a place for runs that is not the user's, a small data set, commands as a user calls them."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["DISTILL_CHECKPOINTS"] = tempfile.mkdtemp(prefix="distill-tests-")  # before distill reads it

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
atexit.register(shutil.rmtree, os.environ["DISTILL_CHECKPOINTS"], ignore_errors=True)


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 20 test images of 4 classes from the embedded sample, so that real pixels go in."""
    from cifar10.data import load_data

    data = load_data("sample")
    train = [i for k in range(4) for i in range(200 * k, 200 * k + 10)]
    test = [i for k in range(4) for i in range(100 * k, 100 * k + 5)]
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(
        path,
        train_images=data.train_images[train].numpy(),
        train_labels=data.train_labels[train].numpy(),
        test_images=data.test_images[test].numpy(),
        test_labels=data.test_labels[test].numpy(),
        classes=np.array(data.classes[:4]),
    )
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 validation photos of 4 classes: CIFAR-10's, enlarged to various sizes, JPEG but for a few."""
    from cifar10.data import load_data as load_small

    data, root = load_small("sample"), tmp_path_factory.mktemp("images") / "photos"
    for k in range(32):
        split, label = ("train", k % 4) if k < 24 else ("val", k % 4)
        folder = root / split / f"n{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(data.train_images[200 * label + k].numpy())
        image = image.resize((90 + 7 * k, 70 + 5 * (k % 9)), Image.Resampling.BICUBIC)
        if k == 5:
            image = image.convert("L")
        image.save(folder / (f"{k:02d}.png" if k == 6 else f"{k:02d}.JPEG"), quality=90)
    return root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs land by default."""
    modules = (
        "distill.run.directory",
        "distill.run.paths",
        "distill.training.task",
        "cifar10.task",
        "cifar10.folder",
        "imagenet.survey",
    )
    for module in modules:
        monkeypatch.setattr(f"{module}.CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr("distill.teacher.cached.STORES", tmp_path / "checkpoints" / "stores")
    return tmp_path / "checkpoints"


def without_first(source: Path, target: Path) -> str:
    """The path of an .npz file with the images of another but its first training image."""
    arrays = dict(np.load(source))
    arrays["train_images"], arrays["train_labels"] = arrays["train_images"][1:], arrays["train_labels"][1:]
    np.savez(target, **arrays)
    return str(target)


def teacher_file(path: Path, classes: int = 4, arch: str = "densenet_cifar") -> str:
    """The path of a file with the weights of a network, as others save them."""
    from cifar10.models import MODELS

    torch.save({"net": MODELS.build(arch, classes).state_dict(), "acc": 92.4, "epoch": 1}, path)
    return str(path)


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command() -> Command:
    """Run a Python file of the repository with arguments, as a user does; returns exit code, stdout, stderr."""

    def run(file: str, *arguments: object, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, str(ROOT / file), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)

    return run


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
