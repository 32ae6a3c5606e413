"""Feature distillation: margins and losses as recorded, places as a hand-written forward has them, connectors that are
trained, resumed and left out of what is exported, a teacher that does not move."""

import copy
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10 import train_ce, train_kd
from cifar10.data import load_data, prepare
from cifar10.models import CIFAR_INPUT, MODELS
from distill.config.recipe import Options, Recipe
from distill.data.datasets import Batch, TensorData, TensorTestData
from distill.errors import UserError
from distill.features.loss import FeatureLoss
from distill.features.points import FeatureExtractor, find_embedding_point, find_feature_points
from distill.files import checkpoint
from distill.losses import FEATURES, METHODS
from distill.losses.feature_method import pool_to
from distill.losses.kd_loss import KD
from distill.losses.overhaul import Overhaul, margin, partial_l2
from distill.losses.reviewkd import ReviewKD
from distill.models import weights
from distill.models.classifier import Classifier, InputSpec
from distill.parallel.devices import multiplies_bfloat16
from distill.run.run import Run
from distill.teacher.cached import CachedTeacher, LogitCache
from distill.teacher.store import Encoding
from distill.teacher.teacher import Teacher
from distill.training.engine import fit
from distill.training.objectives import CrossEntropy, build_loss
from distill.training.stop import Stopped
from tests.runs import tiny

CPU = torch.device("cpu")
DATA = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((DATA / "golden_losses.json").read_text())
OURS = {MODELS.resolve(name) for name in json.loads((DATA / "golden_cifar10_models.json").read_text())}


def images(count: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def value(loss: FeatureLoss, connected: list[Tensor], seen: Tensor) -> Tensor:
    """The loss of the student's features of these images."""
    batch = Batch(seen, torch.zeros(len(seen), dtype=torch.int64), torch.arange(len(seen)))
    return loss(connected, loss.teacher_features(seen), batch)


def classifier(arch: str) -> Classifier:
    torch.manual_seed(0)
    network = MODELS.build(arch, 10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that statistics, scales and shifts matter
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return Classifier(network, CIFAR_INPUT)


# --------------------------------------------------------------------------------------------------- margins and losses
def test_margins_of_the_definition() -> None:
    gamma, beta = torch.tensor([1, 0.5, -1, 0.1, 0, 0]), torch.tensor([0, 0.3, -0.5, 2, 0.7, -0.7])
    expected = torch.tensor([-0.79788, -0.30751, -1.00916, -0.3, 0, -0.7])
    torch.testing.assert_close(margin(gamma, beta), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("case", [0, 1])
def test_agrees_with_the_reference(case: int) -> None:
    inputs, losses = CASES[case]["inputs"], CASES[case]["losses"]
    known = losses["ofd_margin"]
    found = margin(torch.tensor(known["gamma"]), torch.tensor(known["beta"]))
    torch.testing.assert_close(found, torch.tensor(known["margin"]), rtol=1e-5, atol=1e-6)

    def wave(amplitude: float, frequency: float, phase: float) -> Tensor:
        k = np.arange(inputs["N"] * 32 * 16, dtype=np.float64)
        values = amplitude * np.sin(frequency * k + phase)
        values += 0.3 * amplitude * np.cos(0.11 * k * frequency + 2 * phase)
        return torch.from_numpy(values.astype(np.float32)).reshape(inputs["N"], 32, 4, 4)

    student = wave(1.0, 0.013 * 3, inputs["phase"]).requires_grad_()
    loss = partial_l2(student, wave(1.2, 0.017 * 3, inputs["phase"] + 1), found)
    expected = losses["ofd_partial_l2_sum"]
    assert loss.item() == pytest.approx(expected["value"], rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    torch.testing.assert_close(student.grad.flatten()[:5], torch.tensor(expected["grad_head"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_contract_of_partial_l2(dtype: torch.dtype, size: float) -> None:
    student, teacher = ((size * torch.randn(4, 3, 5, 5).clamp(-1, 1)).to(dtype).requires_grad_() for _ in range(2))
    limits = torch.tensor([-1.0, -0.5, 0])
    loss = partial_l2(student, teacher, limits)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert teacher.grad is None
    turned = partial_l2(student.detach().flip(0), teacher.detach().flip(0), limits)
    torch.testing.assert_close(turned, loss.detach(), rtol=1e-5, atol=0)
    target = torch.maximum(teacher.detach().float(), limits.view(1, -1, 1, 1))
    assert partial_l2(target, teacher, limits) == 0
    below = torch.where(
        target > 0, target, target - 1
    )  # further below where the teacher is silent too: nothing to learn
    assert partial_l2(below, teacher, limits) == 0


def test_shapes_that_do_not_fit() -> None:
    for shapes in (((2, 3, 4, 4), (2, 3, 4, 5), (3,)), ((2, 3, 4, 4), (2, 3, 4, 4), (4,)), ((2, 3), (2, 3), (3,))):
        student, teacher, limits = map(torch.zeros, shapes)
        with pytest.raises(ValueError, match=r"features must both be \(B, C, H, W\)"):
            partial_l2(student, teacher, limits)


# --------------------------------------------------------------------------------------------------------------- places
def resnet_by_hand(network: Any, x: Tensor, stages: tuple[str, ...]) -> Iterator[Tensor]:
    for name in stages:
        for block in getattr(network, name):
            out = F.relu(block.bn1(block.conv1(x)))
            out = block.bn2(block.conv2(out))
            if hasattr(block, "conv3"):
                out = block.bn3(block.conv3(F.relu(out)))
            shortcut = getattr(block, "shortcut", None) or getattr(block, "downsample", None)
            out = out + (shortcut(x) if shortcut is not None else x)
            x = F.relu(out)
        yield out


def resnet18_by_hand(network: Any, x: Tensor) -> list[Tensor]:
    x = F.relu(network.bn1(network.conv1(x)))
    return list(resnet_by_hand(network, x, ("layer1", "layer2", "layer3", "layer4")))


def resnext_by_hand(network: Any, x: Tensor) -> list[Tensor]:
    x = F.relu(network.bn1(network.conv1(x)))
    return list(resnet_by_hand(network, x, ("layer1", "layer2", "layer3")))


def densenet40_by_hand(network: Any, x: Tensor) -> list[Tensor]:
    first = network.trans1.bn1(network.dense1(network.conv1(x)))
    second = network.trans2.bn1(network.dense2(F.avg_pool2d(network.trans1.conv1(F.relu(first)), 2)))
    third = network.bn(network.dense3(F.avg_pool2d(network.trans2.conv1(F.relu(second)), 2)))
    return [first, second, third]


def efficientnet_by_hand(network: Any, x: Tensor) -> list[Tensor]:
    out, found = F.silu(network.bn1(network.conv1(x))), []
    for k, block in enumerate(network.layers):
        out = block(out)
        if k in (0, 2, 4, 10, 15):
            found.append(out)
    return found


def torchvision_resnet50_by_hand(network: Any, x: Tensor) -> list[Tensor]:
    x = F.max_pool2d(F.relu(network.bn1(network.conv1(x))), 3, 2, 1)
    return list(resnet_by_hand(network, x, ("layer1", "layer2", "layer3", "layer4")))


def torchvision_resnet50() -> Classifier:
    from torchvision.models import resnet50  # type: ignore[import-untyped]

    torch.manual_seed(0)
    return Classifier(resnet50(num_classes=10), InputSpec(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))


BY_HAND: dict[str, tuple[Callable[[], Classifier], Callable[[Any, Tensor], list[Tensor]]]] = {
    "resnet18": (lambda: classifier("resnet18"), resnet18_by_hand),
    "resnext29_2x64d": (lambda: classifier("resnext29_2x64d"), resnext_by_hand),
    "densenet40": (lambda: classifier("densenet40"), densenet40_by_hand),
    "efficientnet_b0": (lambda: classifier("efficientnet_b0"), efficientnet_by_hand),
    "torchvision's resnet50, whose activations work in place": (torchvision_resnet50, torchvision_resnet50_by_hand),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_features_are_those_of_a_hand_written_forward(name: str) -> None:
    build, by_hand = BY_HAND[name]
    network = build()
    places = find_feature_points(network, name)
    extractor, pixels = FeatureExtractor(network, places).eval(), images(2, network.spec.size)
    with torch.no_grad():
        logits, found = extractor(pixels)
        expected = by_hand(network.network, network.normalise(pixels))
        torch.testing.assert_close(logits, network(pixels))
    assert len(found) == len(expected)
    for place, feature, other in zip(places, found, expected, strict=True):
        assert tuple(feature.shape[1:]) == place.shape
        assert (feature < 0).any()
        torch.testing.assert_close(feature, other)
    # in training the gradient of the features reaches the first layer
    _, found = extractor.train()(pixels)
    sum(feature.float().square().sum() for feature in found).backward()  # type: ignore[union-attr]
    first = next(network.parameters()).grad
    assert first is not None
    assert torch.isfinite(first).all()
    assert first.any()


@pytest.mark.slow
@pytest.mark.parametrize("arch", MODELS.names())
def test_every_network_has_stages_and_margins(arch: str) -> None:
    network = classifier(arch)
    if arch not in OURS:  # one that is added may have none, and is refused then
        with suppress(UserError):
            assert len(find_feature_points(network, arch)) >= 2
        return
    before, mode = checkpoint.digest(network.state_dict()), network.network.training
    places = find_feature_points(network, arch)
    assert len(places) >= 3
    sizes = [place.shape[1] for place in places]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == 32
    assert all(place.scale is not None and len(place.scale) == place.shape[0] for place in places)
    assert checkpoint.digest(network.state_dict()) == before
    assert network.network.training == mode
    embedding = find_embedding_point(network, arch)
    logits, (vectors,) = FeatureExtractor(network.eval(), [embedding])(images(3))
    last = [module for module in network.network.modules() if isinstance(module, nn.Linear)][-1]
    assert vectors.shape == (3, last.in_features)
    scale = 1 if not arch.startswith("airbench") else (logits / last(vectors)).mean()
    torch.testing.assert_close(scale * last(vectors), logits, rtol=1e-4, atol=1e-4)
    if arch == "efficientnet_b0":
        network.network.set_dropout(0.5, 0.0)
        assert FeatureExtractor(network.train(), [embedding])(images(3))[1][0].all(), "it is after dropout"
    network.train(mode)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mobilenet_v2", (16, 24, 32, 96, 320)),
        ("mobilenet_v3_small", (16, 24, 48, 96)),
        ("densenet121", (256, 512, 1024, 1024)),
        ("resnext50_32x4d", (256, 512, 1024, 2048)),
        ("efficientnet_b0", (16, 24, 40, 112, 320)),
        ("efficientnet-b0", (16, 24, 40, 112, 320)),
        ("regnet_y_400mf", (48, 104, 208, 440)),
        ("convnext_tiny", (96, 192, 384, 768)),
    ],
)
def test_networks_of_others(name: str, channels: tuple[int, ...]) -> None:
    """At 64 pixels; in training, with dropped blocks, the features are at the same places."""
    from imagenet.models import find

    known = find(name).at(64)
    network = Classifier(known.build(num_classes=10), known.spec)
    places = find_feature_points(network, name)
    assert tuple(place.shape[0] for place in places) == channels
    assert find_embedding_point(network, name).shape[0] >= channels[-1]
    _, found = FeatureExtractor(network, places).train()(images(2, 64))
    assert [tuple(feature.shape[1:]) for feature in found] == [place.shape for place in places]


def test_features_after_the_activation() -> None:
    """Those of a stage of a ResNet are what its last ReLU returns, and of a linear block what it is without one."""
    for arch in ("resnet18", "mobilenetv2"):
        network = classifier(arch).eval()
        points = find_feature_points(network, arch)
        _, before = FeatureExtractor(network, points)(images())
        _, after = FeatureExtractor(network, points, after=True)(images())
        for point, own, other in zip(points, before, after, strict=True):
            torch.testing.assert_close(own if "linear" in point.where else own.relu(), other)
            assert ("linear" in point.where) == bool((other < 0).any())


@pytest.mark.parametrize("name", ["alexnet", "vit_b_32"])
def test_networks_without_stages_are_refused(name: str) -> None:
    from imagenet.models import find

    known = find(name)
    with pytest.raises(UserError, match=f"in {name} . ends of stages were found, at least 2 are needed: maps"):
        find_feature_points(Classifier(known.build(num_classes=10), known.spec), name)


class ScaledConvolution(nn.Conv2d):
    """Its weight is computed, by an addition among others."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / torch.sqrt(self.weight.var((1, 2, 3), keepdim=True) + 1e-10), padding=1)


def test_what_is_computed_from_weights_alone_is_no_feature() -> None:
    layers: list[nn.Module] = []
    for few, many in ((3, 4), (4, 4), (4, 8), (8, 8)):
        layers += [ScaledConvolution(few, many, 3), nn.BatchNorm2d(many), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if few == many else []
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    places = find_feature_points(Classifier(network, CIFAR_INPUT), "scaled")
    assert [place.shape for place in places] == [(4, 32, 32), (8, 16, 16)]


# ------------------------------------------------------------------------------------------------- the loss of features
@pytest.mark.parametrize(("student", "teacher"), [("efficientnet_b0", "resnet18"), ("resnet18", "efficientnet_b0")])
def test_the_sum_over_stages(student: str, teacher: str) -> None:
    """Lists aligned at the end, the larger map pooled, halves of weights from the last stage on."""
    learning, teaching = classifier(student), Teacher(classifier(teacher))
    loss = FeatureLoss(learning, teaching, (student, teacher))
    batch = images(3)
    with torch.no_grad():
        _, own = loss.model.eval()(batch)
        _, known = FeatureExtractor(teaching.network, find_feature_points(teaching.network, teacher))(batch)
        total = 0.0
        for k, (s, t, place) in enumerate(zip(own[::-1], known[::-1], loss.teacher_points[::-1], strict=False)):
            assert place.scale is not None
            assert place.shift is not None
            t = pool_to(t, (s.shape[2], s.shape[3]))
            total += partial_l2(s, t, margin(place.scale, place.shift)).item() / 2**k
        assert value(loss, own, batch).item() == pytest.approx(total / 3, rel=1e-5)
    assert len(own) == 4
    assert "student layer4.1" in str(loss) or "teacher layer4.1" in str(loss)


def test_a_margin_that_is_measured() -> None:
    """Where there is no BatchNorm: the mean of what is negative, channel by channel, over all batches."""

    def network() -> Classifier:
        layers = [(3, 4), (4, 4), (4, 8), (8, 8)]
        blocks: list[nn.Module] = []
        for k, (few, many) in enumerate(layers):
            blocks += [nn.Conv2d(few, many, 3, padding=1), nn.ReLU(inplace=True)]
            blocks += [nn.MaxPool2d(2)] if k == 1 else []
        return Classifier(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), CIFAR_INPUT)

    torch.manual_seed(0)
    teacher = Teacher(network())
    loss = FeatureLoss(network(), teacher, ("plain", "plain"))
    assert [place.shape for place in loss.teacher_points] == [(4, 32, 32), (8, 16, 16)]
    assert "measured on training images" in str(loss)
    whole = images(6)
    batches = [Batch(part, torch.zeros(2), torch.arange(2)) for part in whole.split(2)]
    loss.measure(iter(batches))
    with torch.no_grad():
        _, features = FeatureExtractor(teacher.network, loss.teacher_points)(whole)
    for found, feature in zip(loss.margins, features, strict=True):
        rows = feature.transpose(0, 1).flatten(1)
        expected = torch.stack([row[row < 0].mean() for row in rows])
        torch.testing.assert_close(found, expected)


def test_replicas_in_threads_keep_their_own_features() -> None:
    """As DataParallel runs them: copies of one network at work at once, whose results are put together."""
    loss = FeatureLoss(classifier("mobilenetv2"), Teacher(classifier("resnet18")), ("mobilenetv2", "resnet18"))
    replicas = [copy.deepcopy(loss.model).eval() for _ in range(3)]
    together, parts = threading.Barrier(3), images(6).split(2)
    for replica in replicas:  # each waits for the others in the middle of its network
        replica.extractor.classifier.network.layers[8].register_forward_hook(lambda *_: (together.wait(60), None)[1])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda replica, part: replica(part), replicas, parts))
    logits, features = loss.model.eval()(images(6))
    torch.testing.assert_close(torch.cat([own for own, _ in found]), logits, rtol=1e-4, atol=1e-4)
    for k, feature in enumerate(features):
        torch.testing.assert_close(torch.cat([own[k] for _, own in found]), feature, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("teacher_bn", ["eval", "batch"])
def test_the_teacher_does_not_move(teacher_bn: str) -> None:
    teacher = Teacher(classifier("densenet_cifar"))
    answer = teacher.logits(images(4))
    loss = FeatureLoss(classifier("resnet18"), teacher, ("resnet18", "densenet_cifar"), Overhaul(teacher_bn=teacher_bn))
    learner = loss.model.train()
    _, own = learner(images(4))
    one, other = value(loss, own, images(4)), value(loss, [f[:2] for f in own], images(4)[:2])
    one.backward()
    teacher.check_untouched()
    assert all(p.grad is None for p in teacher.network.parameters())
    # with statistics of the batch, the feature of an image depends on the others
    with torch.no_grad():
        alone = loss.teacher_features(images(4)[:2])[-1]
        beside = loss.teacher_features(images(4))[-1][:2]
    assert torch.allclose(alone, beside, atol=1e-3) == (teacher_bn == "eval")
    assert one.isfinite()
    assert other.isfinite()
    teacher._fast = []  # answers are those of eval mode, also where they are first asked for afterwards
    assert torch.equal(teacher.logits(images(4)), answer)


# ------------------------------------------------------------------------------------------------------------- training
def kd_run(npz: Path, output: Path, *more: str) -> dict[str, Any]:
    """resnet18, as it is initialised, to mobilenetv2."""
    teacher = output.parent / "teacher.pt"
    if not teacher.exists():
        torch.manual_seed(3)
        torch.save(MODELS.build("resnet18", 4).state_dict(), teacher)
    given = "--arch mobilenetv2 --teacher-arch resnet18 --batch-size 8 --lr 0.01 --epochs 2 --overhaul"
    found = ["--teacher-checkpoint", str(teacher), "--data", str(npz), "--output", str(output), "--seed", "1"]
    with suppress(Stopped):
        train_kd.main([*given.split(), *found, *more])
    loaded: dict[str, Any] = torch.load(output / "last.pt", weights_only=True)
    return loaded


@pytest.mark.slow
def test_a_cut_run_continues_bit_by_bit_and_exports_the_student_alone(small_npz: Path, tmp_path: Path) -> None:
    whole = kd_run(small_npz, tmp_path / "whole", "--T", "4")
    cut = kd_run(small_npz, tmp_path / "cut", "--T", "4", "--steps", "3")
    assert cut["step"] == 3
    assert cut["connectors"].keys() == whole["connectors"].keys()
    kernels = [key for key in whole["connectors"] if key.endswith(".0.weight")]
    assert len(kernels) >= 2
    assert not any(torch.equal(cut["connectors"][key], whole["connectors"][key]) for key in kernels)
    cut = kd_run(small_npz, tmp_path / "cut", "--T", "4")
    for key in ("student", "connectors", "optimizer", "ranks"):
        assert checkpoint.digest(cut[key]) == checkpoint.digest(whole[key]), key
    assert whole["student"].keys() == MODELS.build("mobilenetv2", 4).state_dict().keys()
    exported = weights.load(tmp_path / "whole" / "last.pt").state
    checkpoint.apply_weights(MODELS.build("mobilenetv2", 4), exported, "the exported student")
    record = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert record["method"] == KD(T=4.0).to_dict()
    assert record["features"]["feature_weight"] == 0.001
    assert "feature_weight = 0.001" in record["formula"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all({"train_features", "train_kd", "train_ce"} <= line.keys() for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_cut_run_with_the_batchs_statistics(small_npz: Path, tmp_path: Path) -> None:
    """The answers are those of eval mode, of a teacher rewritten before or after its features were asked for;
    without a store each start asks anew."""
    precision = "bfloat16" if multiplies_bfloat16() else "float32"  # where torch would take minutes
    more = ("--method", "kd", "--teacher-bn", "batch", "--teacher-precision", precision, "--no-store")
    whole = kd_run(small_npz, tmp_path / "whole", *more)
    kd_run(small_npz, tmp_path / "cut", *more, "--steps", "3")
    cut = kd_run(small_npz, tmp_path / "cut", *more)
    for key in ("student", "connectors", "optimizer"):
        assert checkpoint.digest(cut[key]) == checkpoint.digest(whole[key]), key


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_show_features(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--arch resnet18 --teacher-arch densenet40 --batch-size 8 --show-features --data"
    train_kd.main([*given.split(), str(small_npz), "--output", str(tmp_path / "x")])
    shown = capsys.readouterr().out
    assert "student layer4.1, before relu (512, 4, 4)  teacher bn, before relu (456, 8, 8)  margin -0.798" in shown
    assert "densenet40: random weights" in shown
    assert not (tmp_path / "x").exists()
    train_ce.main(["--arch", "densenet40", "--epochs", "1", "--batch-size", "8", "--data", str(small_npz)])
    capsys.readouterr()
    train_kd.main([*given.split(), str(small_npz)])
    shown = capsys.readouterr().out
    assert "densenet40/ce-seed0/last.pt" in shown
    assert "margin -0.798 to -0.798" not in shown


@pytest.mark.usefixtures("home")
def test_a_network_without_stages_is_refused_before_its_teacher_is_trained(
    small_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shallow(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))

    monkeypatch.setitem(MODELS._builders, "shallow", shallow)
    for pair in ("--arch shallow --teacher-arch resnet18", "--arch resnet18 --teacher-arch shallow"):
        with pytest.raises(UserError, match="in shallow 0 ends of stages were found"):
            train_kd.main([*pair.split(), "--overhaul", "--batch-size", "8", "--data", str(small_npz)])


def test_what_returns_no_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    with pytest.raises(UserError, match=r"pair could not be watched at work.*it returns a tuple, not logits"):
        find_feature_points(Classifier(Pair(), CIFAR_INPUT), "pair")


RECIPE = Recipe(teacher_arch="tiny", method=KD(), epochs=4, batch_size=25, lr=0.05, warmup=0, augment="none")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Teacher]:
    """1,000 of the embedded images, a teacher that has learned from them, and 200 test images."""
    data = load_data("sample")
    chosen = torch.arange(0, 2000, 2)
    data = replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])
    views, tests = prepare(data, RECIPE, CPU)
    network = tiny(24, 1)
    given: dict[str, Any] = {"student": network, "loss": CrossEntropy(), "data": views, "tests": tests}
    facts = {"data": "sample", "data_digest": ""}
    path, recipe = tmp_path_factory.mktemp("runs") / "teacher", replace(RECIPE, epochs=6, lr=0.1)
    with Run(path, recipe, Options(), facts) as run:
        found = fit(run, **given)
    assert found.test.accuracy > 25
    few = {"test": TensorTestData(tests["test"].images[::5], tests["test"].labels[::5])}
    return views, few, Teacher(network)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_any_method_on_features_is_continued_bit_by_bit(
    name: str, taught: tuple[Any, Any, Teacher], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut in its second epoch: student, what learns beside it, memories, optimiser; the student alone is exported."""
    views, tests, teacher = taught
    recipe = replace(RECIPE, epochs=2, batch_size=40).with_flags({"features": name, "T": 4.0})
    if name == "crd":
        recipe = recipe.with_flags({"negatives": 100})
    plan = replace(views.plan, indices=np.arange(200), batch_size=recipe.batch_size)
    views = TensorData(views.images[::5], views.labels[::5], plan, views.policy)

    def run(path: Path, steps: int | None = None) -> dict[str, Any]:
        student = tiny(16, 2)
        aim = build_loss(recipe, student, teacher, views)
        cached = CachedTeacher(views, [LogitCache(teacher, None, Encoding(10))])
        facts = {"data": "sample", "data_digest": ""}
        with suppress(Stopped), Run(path, recipe, Options(steps=steps), facts) as held:
            fit(held, student=student, loss=aim, data=views, teacher=cached, tests=tests)
        return checkpoint.load(path / "last.pt")

    whole = run(tmp_path / "whole")
    for steps in (7, None):
        cut = run(tmp_path / "cut", steps)
    for part in ("student", "connectors", "memory", "optimizer", "ranks"):
        assert checkpoint.digest(cut.get(part)) == checkpoint.digest(whole.get(part)), part
    teacher.check_untouched()
    assert (whole["connectors"] is not None) == bool(FEATURES[name].learns)
    assert ("memory" in whole) == (name == "crd")
    if name == "crd":
        assert "two memories of 200 images x 128 take 0.2 MB" in capsys.readouterr().out
        assert cut["memory"]["student"].norm(dim=1).sub(1).abs().max() < 1e-3  # every image was seen
    assert whole["student"].keys() == tiny(16, 2).network.state_dict().keys()


def test_the_levels_of_reviewkd() -> None:
    """Stages before their activation, and what the last layer gets, in both networks."""
    teacher = Teacher(classifier("resnet18"))
    loss = FeatureLoss(classifier("mobilenetv2"), teacher, ("mobilenetv2", "resnet18"), ReviewKD())
    *stages, vector = loss.teacher_features(images())
    own, other = [[point.shape for point in points] for points in (loss.student_points, loss.teacher_points)]
    assert [len(shape) for shape in own] == [len(shape) for shape in other] == [*[3] * len(stages), 1]
    assert (own[-1], other[-1]) == ((1280,), (512,))
    assert all(stage.min() < 0 for stage in stages)
    assert torch.equal(vector, F.relu(stages[-1]).mean((2, 3)))
    _, connected = loss.model(images(), [*stages, vector])
    assert [tensor.shape[1] for tensor in connected] == [shape[0] for shape in other]
    assert connected[-1].shape[2:] == (1, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_the_method_of_the_page(small_npz: Path, tmp_path: Path) -> None:
    """Its file alone, put where it belongs, makes a method: flags, a run, its record."""
    blocks = re.findall(
        r"```python\n(.*?)```", (DATA.parents[1] / "distill" / "README.md").read_text(), flags=re.DOTALL
    )
    (source,) = [block for block in blocks if "FeatureMethod" in block]
    root = tmp_path / "copy"
    for folder in ("distill", "cifar10", "imagenet", "scripts"):
        shutil.copytree(DATA.parents[1] / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(DATA.parents[1] / "requirements.txt", root)
    (root / "distill" / "losses" / "gap.py").write_text(source)
    command = "--arch mobilenetv2 --teacher-arch resnet18 --features gap --feature-weight 2 --epochs 1 --batch-size 8"
    teacher = tmp_path / "resnet18.pth"
    torch.save(MODELS.build("resnet18", 4).state_dict(), teacher)
    words = [*command.split(), "--data", str(small_npz), "--output", str(tmp_path / "run")]
    words += ["--teacher-checkpoint", str(teacher)]
    done = subprocess.run(
        [sys.executable, root / "cifar10" / "train_kd.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert record["features"] == {"name": "gap", "feature_weight": 2.0}
    assert record["trained_by"] == "GAP from resnet18"


VARIANTS = ("kd standardized", "dkd standardized", "none overhaul", "kd overhaul", "dist overhaul")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *(name for name, method in METHODS.items() if method.needs_teacher_logits),
        *VARIANTS,
        *(f"none {name}" for name in FEATURES if name != "overhaul"),
    ],
)
def test_every_method_lowers_its_loss_and_trains(method: str, taught: tuple[Any, Any, Teacher], tmp_path: Path) -> None:
    views, tests, teacher = taught
    name, *more = method.split()
    given: dict[str, Any] = {"method": name, **({"standardize": True} if "standardized" in more else {})}
    recipe = RECIPE.with_flags({**given, "features": next((word for word in more if word in FEATURES), "none")})
    assert recipe.method
    if "crd" in more:
        recipe = recipe.with_flags({"negatives": 400, "contrast_temperature": 0.2})  # of 1,000 images
    if "reviewkd" in more:
        recipe = recipe.with_flags({"feature_warmup": 2.0})
    if recipe.method.kd_warmup:
        recipe = recipe.with_flags({"kd_warmup": 2.0})  # its authors' is longer than this run
    student = tiny(16, 2)
    aim = build_loss(recipe, student, teacher, views)
    cached = CachedTeacher(views, [LogitCache(teacher, None, Encoding(10))]) if recipe.uses_teacher_logits else None
    facts = {"data": "sample", "data_digest": ""}
    with Run(tmp_path, recipe, Options(), facts) as run:
        found = fit(run, student=student, loss=aim, data=views, teacher=cached, tests=tests)
    teacher.check_untouched()
    first, last = found.records[0], found.records[-1]
    for part in aim.parts:
        assert last[f"train_{part}"] < first[f"train_{part}"], part
    assert found.test.accuracy > 20  # chance is 10
