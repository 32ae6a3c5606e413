"""DenseNet for 32x32 images, both kinds that people have checkpoints of. Huang et al. 2016, arXiv:1608.06993."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models.registry import MODELS


class Bottleneck(nn.Module):
    """BN-ReLU-1x1 to 4 x growth channels, BN-ReLU-3x3 to growth; the new channels come first."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([new, x], 1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then 2x2 average pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC: bottlenecks, and compression by half between the four dense blocks."""

    dense1: nn.Sequential
    dense2: nn.Sequential
    dense3: nn.Sequential
    dense4: nn.Sequential
    trans1: Transition
    trans2: Transition
    trans3: Transition

    def __init__(self, depths: list[int], growth: int, num_classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for stage, depth in enumerate(depths, start=1):
            blocks = [Bottleneck(channels + i * growth, growth) for i in range(depth)]
            self.add_module(f"dense{stage}", nn.Sequential(*blocks))
            channels += depth * growth
            if stage < len(depths):
                self.add_module(f"trans{stage}", Transition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv1(x)))
        out = self.trans3(self.dense3(self.trans2(self.dense2(out))))
        out = F.relu(self.bn(self.dense4(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """BN-ReLU-3x3 to growth channels; the new channels come last."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)


class BasicTransition(nn.Module):
    """BN-ReLU-1x1 that keeps the channels, then 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class BasicDenseNet(nn.Module):
    """Three dense blocks of `depth` basic blocks, no compression: depth 12, growth 12 is DenseNet-40."""

    dense1: nn.Sequential
    dense2: nn.Sequential
    dense3: nn.Sequential
    trans1: BasicTransition
    trans2: BasicTransition

    def __init__(self, depth: int, growth: int, num_classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            blocks = [BasicBlock(channels + i * growth, growth) for i in range(depth)]
            self.add_module(f"dense{stage}", nn.Sequential(*blocks))
            channels += depth * growth
            if stage < 3:
                self.add_module(f"trans{stage}", BasicTransition(channels))
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv1(x)))
        out = self.dense3(self.trans2(self.dense2(out)))
        logits: Tensor = self.fc(F.relu(self.bn(out)).mean((2, 3)))
        return logits


@MODELS.register
def densenet40(num_classes: int) -> nn.Module:
    return BasicDenseNet(12, 12, num_classes)


@MODELS.register
def densenet121(num_classes: int) -> nn.Module:
    return DenseNet([6, 12, 24, 16], 32, num_classes)


@MODELS.register
def densenet161(num_classes: int) -> nn.Module:
    return DenseNet([6, 12, 36, 24], 48, num_classes)


@MODELS.register
def densenet169(num_classes: int) -> nn.Module:
    return DenseNet([6, 12, 32, 32], 32, num_classes)


@MODELS.register
def densenet201(num_classes: int) -> nn.Module:
    return DenseNet([6, 12, 48, 32], 32, num_classes)


@MODELS.register
def densenet_cifar(num_classes: int) -> nn.Module:
    return DenseNet([6, 12, 24, 16], 12, num_classes)
