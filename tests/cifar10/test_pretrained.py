"""ImageNet's networks on small images: their names, their size, their weights, and what they teach."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar10 import train_ce, train_kd
from cifar10.models import MODELS, build_student, find, resolve
from cifar10.recipes import RECIPES
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.losses.kd_loss import KD
from distill.models import weights
from distill.training.wrap import check_batch_norm
from tests.conftest import without_first
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
        ("imagenet:mobilenet_v3_small", "mobilenet_v3_small"),  # there is but one of that name
        ("MobileNet_V3_Small", "mobilenet_v3_small"),
        ("timm:mobilenetv3_small_050", "timm:mobilenetv3_small_050"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert resolve(name) == expected
    for spelling in (name, expected):
        assert find(spelling).arch == expected
        assert find(spelling).spec.size == (32 if expected in MODELS.names() else 96)


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


def test_recipes_without_dropout_are_for_networks_that_have_none_too() -> None:
    build_student(replace(RECIPES["short_student"], arch=ARCH, drop_connect=0.0), TEN, Options(), CPU)
    with pytest.raises(UserError, match="--dropout, --drop-connect: shufflenet_v2_x0_5 does not have"):
        build_student(replace(CE, dropout=0.1), TEN, Options(), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "ema"}, "--weights raw and ema are of a file: give --init FILE"),
        ({"weights": "V9"}, "torchvision's weights of shufflenet_v2_x0_5 are IMAGENET1K_V1, not V9"),
        (
            {"arch": "resnet18", "image_size": None, "weights": "V9"},
            "--weights (.but raw and ema.)? are for ImageNet's",
        ),
    ],
)
def test_weights_that_are_not_there(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(.but raw and ema.)?", r"\(but raw and ema\)")):
        build_student(replace(CE, **changes), TEN, Options(), CPU)


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("alexnet", {"image_size": 32}, "--image-size: alexnet cannot see images of 32 pixels"),
        ("airbench94", {"sizes": "8:1"}, "--sizes: airbench94 cannot see images of 8 pixels"),
        ("resnet18", {"sizes": "8:1", "batch_size": 1}, "--batch-size 1 is one image at a time, of which a BatchNorm"),
    ],
)
def test_sizes_that_are_too_small_are_refused_before_step_1(
    arch: str, changes: dict[str, object], message: str
) -> None:
    recipe = replace(Recipe(arch=arch, epochs=2, batch_size=8), **changes)
    student, _ = build_student(recipe, TEN, Options(), CPU)
    with pytest.raises(UserError, match=message):
        check_batch_norm(student, arch, recipe, "cpu")
    assert student.training_size is None


def test_timm_builds_for_a_size_where_it_can() -> None:
    network = find("timm:efficientvit_b0", 64)  # it takes no size: it is built for any
    assert network.build(num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


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
    taught = Recipe(arch="airbench94", teacher_arch=ARCH, method=KD(), epochs=2, batch_size=8, views=1)
    for size, expected in ((None, 40), (48, 48)):
        recipe = replace(taught, teacher_image_size=size, seed=size or 0)
        summary = train_kd.train(recipe, Options(data=str(small_npz), teacher_checkpoint=str(file)))
        said = capsys.readouterr().out
        assert f"{ARCH} from {file}, at {expected} pixels, test accuracy" in said
        assert "teacher: 40 views computed" in said
        assert summary is not None
        assert summary["teacher_accuracy"] is not None
    assert len(list((home / "stores").glob("*/key.json"))) == 2


@pytest.mark.usefixtures("home")
def test_a_teacher_with_imagenet_weights_is_trained_first(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(arch="densenet_cifar", teacher_arch="efficientnet-lite0", method=KD(), epochs=30, batch_size=8)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(recipe, Options(data=str(small_npz), steps=1))
    said = capsys.readouterr().out
    assert "trained first by CE from its ImageNet weights, 12 epochs, lr 0.0025, batch 8" in said
    assert "efficientnet-lite0: sees the images enlarged to 96 pixels" in said


@pytest.mark.usefixtures("home")
def test_a_run_whose_data_changed_goes_on_with_its_teacher(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher was trained on the images as they were: it is not trained again on the others."""
    recipe = Recipe(arch="airbench94", teacher_arch="airbench94", method=KD(), epochs=3, batch_size=8)
    train_ce.train(replace(CE, arch="airbench94", image_size=None, epochs=3), Options(data=str(small_npz)))
    options = Options(data=str(small_npz), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match="stopped after 6 steps"):
        train_kd.train(recipe, replace(options, steps=6))
    fewer = without_first(small_npz, tmp_path / "fewer.npz")
    changed = replace(options, data=fewer, allow_data_change=True)
    capsys.readouterr()
    with pytest.raises(UserError, match="stopped after 2 steps"):
        train_kd.train(recipe, replace(changed, steps=2))
    assert train_kd.train(recipe, changed) is not None  # also when the others are those of the last start
    assert "trained first" not in capsys.readouterr().out
