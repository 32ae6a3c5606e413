"""Depthwise convolutions on small maps: the same numbers as torch's, and which ones they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar10.models import CIFAR_INPUT, MODELS
from distill.models import depthwise
from distill.models.classifier import Classifier
from distill.models.depthwise import SmallMaps


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights whose gradient was computed here."""
    shapes: list[torch.Size] = []
    own = depthwise.weight_gradient

    def note(x: Tensor, gradient: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        shapes.append(weight.shape)
        found = own(x, gradient, weight, *rest)
        assert found.stride() == weight.stride()  # or DistributedDataParallel warns, and copies
        return found

    monkeypatch.setattr(depthwise, "weight_gradient", note)
    return shapes


def gradients(convolution: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = convolution(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *convolution.parameters()])]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((2, 2), 5, 1, 2),
        ((3, 3), 5, 2, 2),
        ((4, 3), 5, 1, 2),
        ((7, 7), 5, 2, 0),
        ((2, 1), 3, 1, 1),
        ((3, 2), (5, 3), (2, 1), (2, 1)),
    ],
)
def test_gradients_are_those_of_torch(
    size: tuple[int, int], kernel: Any, stride: Any, padding: Any, layout: torch.memory_format, taken: list[torch.Size]
) -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 8, *size, dtype=torch.float64).to(memory_format=layout)
    convolution = nn.Conv2d(8, 8, kernel, stride, padding, groups=8, bias=False).double().to(memory_format=layout)
    expected = gradients(convolution, x)
    assert not taken
    with SmallMaps():
        found = gradients(convolution, x)
    assert len(taken) == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (5, {"groups": 8, "padding": 2}),  # not smaller than its kernel
        (2, {"groups": 4, "padding": 2}),
        (2, {"groups": 1, "padding": 2}),
        (2, {"groups": 8, "padding": 2, "bias": True}),
        (2, {"groups": 8, "padding": "same"}),
        (4, {"groups": 8, "padding": 4, "dilation": 2}),
    ],
)
def test_other_convolutions_are_torchs_own(size: int, words: dict[str, Any], taken: list[torch.Size]) -> None:
    x = torch.randn(2, 8, size, size)
    convolution = nn.Conv2d(8, 8, 5, **{"bias": False, **words})
    expected = gradients(convolution, x)
    with SmallMaps():
        found = gradients(convolution, x)
    assert not taken
    assert all(map(torch.equal, found, expected))


def test_numbers_in_place_of_pairs_are_torchs_own(taken: list[torch.Size]) -> None:
    weight = nn.Parameter(torch.randn(8, 1, 5, 5))
    with SmallMaps():
        for given in (
            (1, 2, 1),
            ((1, 1), 2, (1, 1)),
            (1, (2, 2), (1, 1)),
            ((1, 1), (2, 2), 1),
            ([1, 1], [2, 2], [1, 1]),
        ):
            torch.conv2d(torch.randn(2, 8, 2, 2), weight, None, *given, 8).sum().backward()
    assert not taken


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_network_takes_them_in_training(precision: torch.dtype, taken: list[torch.Size]) -> None:
    """EfficientNet-B0 at 16 pixels; in float64 its gradients are those that torch has."""
    torch.manual_seed(1)
    student = Classifier(MODELS.build("efficientnet_b0", 10), CIFAR_INPUT, precision)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    if precision == torch.float32:
        student = student.double()
    torch.manual_seed(2)  # of dropout
    student(images).sum().backward()
    assert bool(taken) == (precision == torch.float32)
    if precision == torch.float32:
        found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert len(taken) == 13  # 2 at 4 pixels, 6 at 2, 5 at 1
        student.zero_grad()
        torch.manual_seed(2)
        student.network(student.normalise(images).double()).sum().backward()
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    taken.clear()
    with torch.no_grad():
        student(images)
    assert not taken
