"""Every registered network: agreement with the reference, and the contracts of a network."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar10.models import MODELS
from cifar10.models.efficientnet import Block, EfficientNet
from distill.errors import UserError
from distill.models.classifier import Classifier, InputSpec
from distill.models.registry import Registry

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "golden_cifar10_models.json").read_text())


def golden_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by formula that the recorded logits belong to."""
    weights = {}
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        wave = np.sin(np.arange(value.numel()) * 0.37 + zlib.crc32(key.encode()) % 1000)
        if key.endswith("running_var") or (value.dim() == 1 and key.endswith(".weight")):
            wave = 1 + 0.1 * wave
        elif value.dim() == 1:
            wave = 0.1 * wave
        else:
            wave = wave * math.sqrt(2 / np.prod(value.shape[1:]))
        weights[key] = torch.from_numpy(wave.astype(np.float32)).reshape(value.shape)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_agrees_with_the_reference(name: str) -> None:
    expected = GOLDEN[name]
    network = MODELS.build(name, 10).eval()  # the reference's spelling of the name resolves
    shapes = {k: list(v.shape) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert shapes == expected["shapes"]
    assert sum(p.numel() for p in network.parameters()) == expected["params"]
    network.load_state_dict(golden_weights(network), strict=False)
    images = torch.from_numpy(np.sin(np.arange(2 * 3 * 32 * 32) * 0.013).astype(np.float32)).reshape(2, 3, 32, 32)
    logits = torch.tensor(expected["logits"])
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            found = network.to(memory_format=memory_format)(images.to(memory_format=memory_format))
            assert (found - logits).abs().max() < 1e-4 * logits.abs().max()


def test_every_reference_network_is_here() -> None:
    assert {MODELS.resolve(name) for name in GOLDEN} <= set(MODELS.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS.names())
def test_contract(name: str) -> None:
    """Shapes for any number of classes, a gradient to every parameter that the function uses, the state_dict."""
    network = MODELS.build(name, 7).train()
    logits = network(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    without = {k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    unused = {"layers.0.conv1.weight", "layers.0.bn1.weight", "layers.0.bn1.bias"}  # as in the reference
    fixed = {k for k, p in network.named_parameters() if not p.requires_grad}
    assert without == (unused if name == "efficientnet_b0" else fixed)
    assert not fixed or name.startswith("airbench")
    again = MODELS.build(name, 7)
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), network.eval()(images))


def test_drop_connect_leaves_out_whole_images_by_depth() -> None:
    network = MODELS.build("efficientnet_b0", 10)
    assert isinstance(network, EfficientNet)
    network.set_dropout(0.0, 0.8)
    rates = [block.drop_connect for block in network.layers if isinstance(block, Block)]
    assert rates == pytest.approx([0.8 * i / 16 for i in range(16)])
    block = network.layers[14].train()
    images = torch.randn(64, 192, 2, 2)
    changed = (block(images) != images).flatten(1).any(1)
    assert 0.1 < changed.float().mean() < 0.6  # kept with 0.3
    assert (block.eval()(images) != images).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("EfficientNetB0", "efficientnet_b0"),
        ("efficientnet-b0", "efficientnet_b0"),
        ("ResNeXt29_2x64d", "resnext29_2x64d"),
        ("RESNET152", "resnet152"),
        ("DenseNet40", "densenet40"),
        ("densenet_cifar", "densenet_cifar"),
        ("mobilenet_v2", "mobilenetv2"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert MODELS.resolve(spelling) == name


def test_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"'resnet51'.*resnet50"):
        MODELS.resolve("resnet51")
    with pytest.raises(UserError, match="known: airbench94, airbench96, densenet121"):
        MODELS.resolve("xyzzy")


def test_a_name_is_registered_once() -> None:
    registry = Registry("test")

    def net(num_classes: int) -> nn.Module:
        return nn.Linear(1, num_classes)

    registry.register(net)
    with pytest.raises(ValueError, match="twice"):
        registry.register(net)


def test_classifier_normalises_uint8() -> None:
    """(x / 255 - mean) / std, channel by channel, and the state_dict of the network keeps its bare keys."""
    spec = InputSpec(2, (0.5, 0.25, 0.75), (0.5, 0.25, 0.125))
    classifier = Classifier(nn.Identity(), spec)
    images = torch.randint(0, 256, (3, 2, 2, 3), dtype=torch.uint8)
    mean, std = torch.tensor(spec.mean).view(1, 3, 1, 1), torch.tensor(spec.std).view(1, 3, 1, 1)
    expected = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(classifier(images), expected)
    assert classifier(images).is_contiguous(memory_format=torch.channels_last)
    assert list(classifier.state_dict()) == []


@pytest.mark.parametrize(
    ("name", "widths", "depth"), [("airbench94", (64, 256, 256), 2), ("airbench96", (128, 384, 512), 3)]
)
def test_airbench_starts_with_copies(name: str, widths: tuple[int, ...], depth: int) -> None:
    """Each 3x3 convolution passes on the channels that come in; stem and scales do not learn."""
    network = MODELS.build(name, 10)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    pairs = [
        [(before, after), *[(after, after)] * (depth - 1)]
        for before, after in zip((24, *widths[:-1]), widths, strict=True)
    ]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [pair for block in pairs for pair in block]
    for convolution in convolutions:
        images = torch.randn(1, convolution.in_channels, 5, 5)
        assert torch.equal(convolution(images)[:, : convolution.in_channels], images)
    assert all(p.is_leaf for p in network.parameters())
    scales = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {k for k, p in network.named_parameters() if not p.requires_grad} == {"conv1.weight", *scales}


def test_airbench_whitens_patches() -> None:
    """What the first convolution puts out for the images it was made from is uncorrelated, with variance about 1."""
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images + images.mean(1, keepdim=True) + F.avg_pool2d(images, 3, 1, 1)  # correlated in colour and space
    network = MODELS.build("airbench94", 10)
    network.initialise(images)
    with torch.no_grad():
        out = network.conv1(images) - network.conv1.bias.view(1, -1, 1, 1)
    kept, negative = out[:, :12], out[:, 12:]
    torch.testing.assert_close(negative, -kept, atol=1e-5, rtol=0)
    flat = kept.transpose(0, 1).reshape(12, -1).double()
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(12).double(), atol=0.01, rtol=0)
