"""ImageNet's networks on small images: their names, their size, their weights, and what they teach."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar10 import train_ce, train_kd
from cifar10.models import MODELS, build_student, find, resolve
from cifar10.recipes import RECIPES
from distill import weights
from distill.errors import UserError
from distill.recipe import Options, Recipe
from tests.runs import CPU

TEN = tuple("abcdefghij")
ARCH = "shufflenet_v2_x0_5"  # small, and torchvision's alone
CE = Recipe(arch=ARCH, image_size=32, epochs=1, batch_size=8, lr=0.01, warmup=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ResNet-18", "resnet18"),
        ("imagenet:ResNet18", "imagenet:resnet18"),
        ("EfficientNet-Lite0", "efficientnet-lite0"),
        ("efficientnet-b0", "efficientnet_b0"),  # CIFAR-10's own, as ever
        ("imagenet:efficientnet-b0", "imagenet:efficientnet-b0"),
        ("MobileNet_V3_Small", "mobilenet_v3_small"),
        ("timm:mobilenetv3_small_050", "timm:mobilenetv3_small_050"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert resolve(name) == expected
    assert find(expected).spec.size == (32 if expected in MODELS.names() else 96)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "'resnet51' for CIFAR-10; near it: resnet50"),
        ("imagenet:resnet51", "'resnet51' for ImageNet; near it: resnet50"),
        ("timm:resnet51", "timm has no 'resnet51'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 64}, "resnet18 here sees 32x32 images; imagenet:resnet18 is ImageNet's"),
        ({"pretrained": True}, "resnet18 for 32x32 images has no published ImageNet weights; imagenet:resnet18 is"),
        ({"arch": "densenet40", "pretrained": True}, "densenet40 for 32x32 images has no published ImageNet weights"),
    ],
)
def test_what_small_networks_do_not_have(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_student(replace(Recipe(arch="resnet18"), **changes), TEN, Options(), CPU)


def test_published_weights_under_a_new_last_layer() -> None:
    """Every weight but the last layer's is the package's; BatchNorm follows at the rate that is asked for."""
    recipe = replace(RECIPES["pretrained_teacher"], seed=3)
    student, digest = build_student(recipe, TEN, Options(), CPU)
    published = find(recipe.arch).fetch("")
    own = student.network.state_dict()
    assert own["_fc.weight"].shape == (10, 1280)
    assert all(torch.equal(own[key], value) for key, value in published.items() if not key.startswith("_fc"))
    assert student.spec.size == 96
    assert {m.momentum for m in student.network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert digest == build_student(recipe, TEN, Options(), CPU)[1]
    assert digest != build_student(replace(recipe, seed=4), TEN, Options(), CPU)[1]


def test_small_images_are_enlarged_as_torch_resizes_them() -> None:
    student, _ = build_student(replace(CE, image_size=48), TEN[:4], Options(), CPU)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    pixels = images.permute(0, 3, 1, 2).float()
    enlarged = nn.functional.interpolate(pixels, (48, 48), mode=student.spec.interpolation, antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (student.spec.mean, student.spec.std))
    torch.testing.assert_close(student.normalise(images), (enlarged.clamp(0, 255) / 255 - mean) / std)


def test_it_is_trained_and_teaches(home: Path, small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher sees the size that it was trained at, whatever is said; its logits are stored under that size."""
    train_ce.train(replace(CE, image_size=40), Options(data=str(small_npz)))
    assert f"{ARCH}: sees the images enlarged to 40 pixels" in capsys.readouterr().out
    file = home / "small" / ARCH / "ce-seed0" / "last.pt"
    assert weights.load(file).spec.size == 40
    taught = Recipe(arch="airbench94", teacher_arch=ARCH, epochs=2, batch_size=8, views=1)
    for size, expected in ((None, 40), (48, 48)):
        recipe = replace(taught, teacher_image_size=size, seed=size or 0)
        summary = train_kd.train(recipe, Options(data=str(small_npz), teacher_checkpoint=str(file)))
        said = capsys.readouterr().out
        assert f"{ARCH} from {file}, at {expected} pixels, test accuracy" in said
        assert "teacher: 40 views answered" in said
        assert summary is not None
        assert summary["teacher_accuracy"] is not None
    assert len(list((home / "stores").glob("*/key.json"))) == 2


@pytest.mark.usefixtures("home")
def test_a_teacher_with_imagenet_weights_is_trained_first(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(arch="densenet_cifar", teacher_arch="efficientnet-lite0", epochs=30, batch_size=8)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(recipe, Options(data=str(small_npz), steps=1))
    said = capsys.readouterr().out
    assert "trained first by CE from its ImageNet weights, 6 epochs, lr 0.0025, batch 8" in said
    assert "efficientnet-lite0: sees the images enlarged to 96 pixels" in said
