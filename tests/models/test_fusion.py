"""A network rewritten for inference computes what it computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models import MODELS
from distill.models.fusion import FusedConvolution, rewrite
from distill.parallel.devices import multiplies_bfloat16


def warmed(network: nn.Module, images: Tensor) -> nn.Module:
    """With BatchNorm statistics that are not 0 and 1."""
    with torch.no_grad():
        network.train()(images)
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MODELS.names() if n not in ("resnext29_8x64d", "densenet161")])
def test_every_network_in_float32(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    network = warmed(MODELS.build(name, 10), images)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fast = rewrite(network, torch.float32, images)
    assert fast.steps[:1] == ("folded",)
    with torch.no_grad():
        expected, found = network(images), fast(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Tricky(nn.Module):
    """Additions whose operands are read again, convolutions that are used twice, a ReLU without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        y = self.second(F.relu(x))
        z = F.relu(x + y)  # x is read below
        u = F.relu(self.third(z) + z)  # z is read below
        v = F.relu(self.third(u) + images.mean())
        w = F.relu(F.relu(x.flatten(2).unflatten(2, (32, 32))) + self.second(v))
        return self.head((w + x + z + u).mean((2, 3)))


def test_memory_that_is_read_again_is_not_overwritten() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    network = Tricky().eval()
    fast = rewrite(network, torch.float32, images)
    with torch.no_grad():
        torch.testing.assert_close(fast(images), network(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(images), network(images), rtol=1e-4, atol=1e-5)


def test_residual_networks_are_fused() -> None:
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    network = warmed(MODELS.build("resnet18", 10), images)
    fast = rewrite(network, torch.float32, images)
    assert fast.steps == ("folded", "fused")
    lower = rewrite(network, torch.bfloat16, images)  # some processors have no fused operators in it
    assert lower.steps == (("folded", "fused") if multiplies_bfloat16() else ("folded",))
    assert lower(images).dtype == torch.bfloat16
    assert sum(isinstance(module, FusedConvolution) for module in fast.modules()) == 17
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        pooled = images.mean((2, 3))
        return self.head(pooled if pooled.sum() > 0 else -pooled)


def test_a_network_that_cannot_be_followed_stays_as_it_is() -> None:
    images = torch.randn(4, 3, 32, 32)
    fast = rewrite(Branching().eval(), torch.float32, images)
    assert fast.steps == ()
    assert fast(images).shape == (4, 4)


class Leaky(nn.Module):
    """An activation called `relu` that is none, and a convolution that has two BatchNorms."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.LeakyReLU(0.05)
        self.twice = twice

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.first(self.convolution(images)))
        return (self.second(self.convolution(x)) if self.twice else x).mean((2, 3))


@pytest.mark.parametrize("twice", [False, True])
def test_a_network_that_would_be_misread(twice: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    network = Leaky(twice)
    for batchnorm in (network.first, network.second):
        nn.init.uniform_(batchnorm.weight)
        nn.init.uniform_(batchnorm.running_mean)  # type: ignore[arg-type]
    network.eval()
    fast = rewrite(network, torch.float32, images)
    assert "fused" not in fast.steps or not twice
    with torch.no_grad():
        torch.testing.assert_close(fast(images), network(images), rtol=1e-4, atol=1e-5)


def test_a_fused_form_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    network = warmed(MODELS.build("resnet18", 10), images)
    for wrong in (lambda *_: torch.zeros(1), lambda self, x, *_: self.convolution(x)):
        monkeypatch.setattr(FusedConvolution, "forward", wrong)
        assert rewrite(network, torch.float32, images).steps == ("folded",)
