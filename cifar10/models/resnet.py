"""ResNet for 32x32 images: a 3x3 stem of stride 1 and no max-pooling. He et al. 2015, arXiv:1512.03385."""

import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models.registry import MODELS


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The shortcut: identity where shapes agree, else a strided 1x1 convolution with BatchNorm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1 convolutions; `out_channels` leave the block."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, groups: int = 1, out_channels: int | None = None
    ) -> None:
        super().__init__()
        out_channels = out_channels or self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of 64, 128, 256, 512 channels (times the block's expansion)."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: list[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                channels = 64 * 2**stage
                blocks.append(block(in_channels, channels, stride=2 if stage > 0 and i == 0 else 1))
                in_channels = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@MODELS.register
def resnet18(num_classes: int) -> nn.Module:
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes)


@MODELS.register
def resnet34(num_classes: int) -> nn.Module:
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes)


@MODELS.register
def resnet50(num_classes: int) -> nn.Module:
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes)


@MODELS.register
def resnet101(num_classes: int) -> nn.Module:
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes)


@MODELS.register
def resnet152(num_classes: int) -> nn.Module:
    return ResNet(Bottleneck, [3, 8, 36, 3], num_classes)
