"""The network of airbench94, which learns in few epochs: Jordan 2024, arXiv:2404.00498.

Here it is trained like every other. What belongs to its author's training is left out: the first convolution learns
(there it holds the frozen eigenvectors of training patches), and BatchNorm has a learned scale and torch's momentum.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models.registry import MODELS


class Block(nn.Module):
    """Two 3x3 convolutions, the first one max-pooled by 2."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        for convolution in (self.conv1, self.conv2):  # as many channels as come in start as their copies
            nn.init.dirac_(convolution.weight[: convolution.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        out = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(out)))


class Airbench(nn.Module):
    """A 2x2 convolution without padding, blocks of 64, 256, 256 channels at 15, 7 and 3 pixels, the largest of each
    channel, a linear layer whose result is divided by 9."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 2)
        self.layers = nn.Sequential(Block(24, 64), Block(64, 256), Block(256, 256))
        self.linear = nn.Linear(256, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.gelu(self.conv1(x)))
        logits: Tensor = self.linear(out.amax((2, 3))) / 9
        return logits


@MODELS.register
def airbench94(num_classes: int) -> nn.Module:
    return Airbench(num_classes)
