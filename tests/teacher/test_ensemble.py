"""Several teachers at once: their mean, their stores, and runs that are cut and continued."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10 import train_kd
from cifar10.models import MODELS
from cifar10.task import SmallImages
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.files import checkpoint
from distill.losses import kd_loss
from distill.losses.overhaul import Overhaul
from distill.teacher.ensemble import mean_logits, member_files
from distill.training.stop import Stopped
from imagenet import train_kd as photos_kd

ARCHS = ("airbench94", "densenet_cifar")
KD = Recipe(
    arch="airbench94",
    teacher_arch=",".join(ARCHS),
    method=kd_loss.KD(T=4.0, w=0.9),
    epochs=2,
    batch_size=8,
    lr=0.05,
    warmup=0,
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_means(temperature: float) -> None:
    logits = [5 * torch.randn(6, 7, dtype=torch.float64) for _ in range(4)]
    plain, soft = (mean_logits(logits, how, temperature) for how in ("logits", "probabilities"))
    torch.testing.assert_close(plain, torch.stack(logits).mean(0))
    expected = torch.stack([(value / temperature).softmax(1) for value in logits]).mean(0)
    torch.testing.assert_close((soft / temperature).softmax(1), expected)


@pytest.fixture
def files(tmp_path: Path) -> str:
    paths = [tmp_path / f"{arch}.pt" for arch in ARCHS]
    for arch, path in zip(ARCHS, paths, strict=True):
        torch.save(MODELS.build(arch, 4).state_dict(), path)
    return ",".join(map(str, paths))


@pytest.mark.slow
def test_several_teachers(
    home: Path, small_npz: Path, tmp_path: Path, files: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fills a store of its own, and serves alone from it; without stores, cut and continued, the same bits."""
    recipe, options = replace(KD, ensemble="probabilities"), Options(data=str(small_npz), teacher_checkpoint=files)
    train_kd.train(replace(KD, teacher_arch=ARCHS[1]), replace(options, teacher_checkpoint=files.split(",")[1]))
    capsys.readouterr()
    summary = train_kd.train(recipe, options)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "views computed" in line] == [
        "teacher airbench94: 80 views computed, 0 were in the store",
        "teacher densenet_cifar: 0 views computed, 80 were in the store",
    ]
    assert any(line.startswith("teachers: together, by the mean of their ") for line in said)
    assert summary is not None
    assert summary["trained_by"] == "KD from airbench94 + densenet_cifar"
    run = home / "small" / "airbench94" / "kd-airbench94+densenet_cifar-probabilities-T4-w0.9-seed0"
    alone = replace(options, store=False, output=str(tmp_path / "cut"))
    with pytest.raises(Stopped):
        train_kd.train(recipe, replace(alone, steps=7))
    train_kd.train(recipe, alone)
    one, other = (checkpoint.load(path / "last.pt")["student"] for path in (run, tmp_path / "cut"))
    assert checkpoint.digest(one) == checkpoint.digest(other)


def test_one_teacher_is_its_own_mean(home: Path, small_npz: Path, tmp_path: Path, files: str) -> None:
    """Twice the same teacher teaches what it teaches alone."""
    file, students = files.split(",")[0], []
    for count in (1, 2):
        recipe = replace(KD, teacher_arch=",".join(ARCHS[:1] * count), epochs=1)
        options = Options(data=str(small_npz), output=str(tmp_path / str(count)))
        train_kd.train(recipe, replace(options, teacher_checkpoint=",".join([file] * count)))
        students.append(checkpoint.digest(checkpoint.load(tmp_path / str(count) / "last.pt")["student"]))
    assert students[0] == students[1]
    assert len(list((home / "stores").glob("*/key.json"))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": Overhaul()}, "--features and --top-k take one teacher"),
        ({"top_k": 2}, "--features and --top-k take one teacher"),
        ({"teacher_arch": "resnet18", "ensemble": "probabilities"}, "--ensemble is for several teachers"),
    ],
)
def test_what_several_teachers_cannot_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(KD, **changes)


def test_a_size_is_for_networks_of_photos(small_npz: Path, files: str) -> None:
    recipe = replace(KD, teacher_image_size=64)
    task = SmallImages(recipe, Options(data=str(small_npz), teacher_checkpoint=files))
    with pytest.raises(UserError, match="--teacher-image-size is for ImageNet's networks: airbench94 sees 32x32"):
        task.load_teachers(None)


def test_a_file_for_each() -> None:
    assert member_files(KD, Options()) == [None, None]
    assert member_files(KD, Options(teacher_checkpoint="published")) == ["published"] * 2
    assert member_files(KD, Options(teacher_checkpoint="a,published")) == ["a", "published"]
    assert member_files(replace(KD, teacher_arch="resnet18"), Options(teacher_checkpoint="a,b")) == ["a,b"]
    with pytest.raises(UserError, match="names 3 files for the 2 networks"):
        member_files(KD, Options(teacher_checkpoint="a,b,c"))


@pytest.mark.slow
def test_photos(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teachers of other sizes, and with other normalisation, see the same views, rendered for the largest."""
    teachers = ["--teacher-arch", "mobilenet_v3_small,shufflenet_v2_x0_5", "--teacher-checkpoint", "none"]
    words = ["--arch", "shufflenet_v2_x0_5", "--kd", "--image-size", "32", "--epochs", "1", "--batch-size", "8"]
    photos_kd.main([str(photos), *words, *teachers, "--workers", "0", "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert said.count("views computed") == 2
    assert "teachers: together, by the mean of their logits, test accuracy" in said
