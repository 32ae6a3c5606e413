"""EfficientNet-B0 for 32x32 images: a stem of stride 1 and no last 1x1 convolution.

Tan and Le 2019, arXiv:1905.11946.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models.registry import MODELS


class Stage(NamedTuple):
    """A row of table 1 of the paper: blocks that are alike, of which the first has the stride."""

    expansion: int
    channels: int
    depth: int
    kernel: int
    stride: int


B0 = [
    Stage(1, 16, 1, 3, 1),
    Stage(6, 24, 2, 3, 2),
    Stage(6, 40, 2, 5, 2),
    Stage(6, 80, 3, 3, 2),
    Stage(6, 112, 3, 5, 1),
    Stage(6, 192, 4, 5, 2),
    Stage(6, 320, 1, 3, 1),
]


class SqueezeExcitation(nn.Module):
    """x * sigmoid(se2(silu(se1(mean of x over the image)))), per channel. Hu et al. 2017, arXiv:1709.01507."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.se1 = nn.Conv2d(channels, squeezed, 1)
        self.se2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.se2(F.silu(self.se1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Block(nn.Module):
    """Expand by 1x1, depthwise convolution, squeeze-and-excitation to a quarter of the input, linear 1x1."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        channels = expansion * in_channels
        self.expands = expansion != 1
        # Made also where the block does not expand and they stay unused: the keys of existing checkpoints have them.
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(
            channels, channels, kernel, stride=stride, padding=kernel // 2, groups=channels, bias=False
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, in_channels // 4)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.has_skip = stride == 1 and in_channels == out_channels
        self.drop_connect = 0.0  # rate at which the block is left out, image by image, in training

    def forward(self, x: Tensor) -> Tensor:
        out = F.silu(self.bn1(self.conv1(x))) if self.expands else x
        out = self.se(F.silu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        if not self.has_skip:
            return out
        if self.training and self.drop_connect:
            from torchvision.ops import stochastic_depth  # loads for two seconds, which inference does not need

            out = stochastic_depth(out, self.drop_connect, "row")
        return out + x


class EfficientNet(nn.Module):
    """A stem of stride 1, the stages, the mean over the image, and a linear layer."""

    def __init__(self, stages: list[Stage], dropout: float, num_classes: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks: list[Block] = []
        in_channels = 32
        for stage in stages:
            for i in range(stage.depth):
                stride = stage.stride if i == 0 else 1
                blocks.append(Block(in_channels, stage.channels, stage.expansion, stage.kernel, stride))
                in_channels = stage.channels
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(in_channels, num_classes)

    def set_dropout(self, dropout: float | None, drop_connect: float) -> None:
        """Dropout before the classifier (None: as it is); drop-connect rises linearly from 0 to its rate at the end."""
        self.dropout = self.dropout if dropout is None else dropout
        blocks = [block for block in self.layers if isinstance(block, Block)]
        for i, block in enumerate(blocks):
            block.drop_connect = drop_connect * i / len(blocks)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.silu(self.bn1(self.conv1(x)))).mean((2, 3))
        logits: Tensor = self.linear(F.dropout(out, self.dropout, self.training))
        return logits


@MODELS.register
def efficientnet_b0(num_classes: int) -> nn.Module:
    return EfficientNet(B0, dropout=0.2, num_classes=num_classes)
