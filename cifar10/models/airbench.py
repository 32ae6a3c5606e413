"""The networks of airbench, which learn in few epochs: Jordan 2024, arXiv:2404.00498.

What is its author's: a first convolution that whitens patches and does not learn, convolutions that start as copies of
their input, BatchNorm without a scale, the largest of each channel at the end. What belongs to his training is in the
recipes (cifar10/recipes.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models.registry import MODELS

EPSILON = 5e-4  # added to the variances that patches are divided by, of images with about unit variance


class Block(nn.Module):
    """3x3 convolutions, the first one max-pooled by 2; of three the last adds to what the first put out."""

    def __init__(self, in_channels: int, channels: int, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(in_channels, channels), _norm(channels)
        self.conv2, self.bn2 = _convolution(channels, channels), _norm(channels)
        self.residual = depth == 3
        if self.residual:
            self.conv3, self.bn3 = _convolution(channels, channels), _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        first = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        out = self.bn2(self.conv2(first))
        if self.residual:
            out = self.bn3(self.conv3(F.gelu(out))) + first
        return F.gelu(out)


def _convolution(in_channels: int, channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:in_channels])  # as many channels as come in start as their copies
    return convolution


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    return norm


class Airbench(nn.Module):
    """A 2x2 convolution without padding, three blocks at 15, 7 and 3 pixels, and a linear layer.

    That layer sees the largest value of each channel, and its result is divided by 9.
    """

    def __init__(self, num_classes: int, widths: tuple[int, int, int], depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 2)
        self.conv1.weight.requires_grad_(False)
        channels = zip((24, *widths[:-1]), widths, strict=True)
        self.layers = nn.Sequential(*(Block(before, after, depth) for before, after in channels))
        self.linear = nn.Linear(widths[-1], num_classes, bias=False)

    @torch.no_grad()
    def initialise(self, images: Tensor) -> None:
        """Let the first convolution whiten 2x2 patches of `images`, normalised float32 (N, 3, H, W).

        Its kernels become the eigenvectors of the patches' covariance over the root of the eigenvalue, and their
        negatives.
        """
        patches = F.unfold(images.double(), 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernels = (vectors / (values + EPSILON).sqrt()).T.flip(0)  # the largest first
        kernels *= torch.where(kernels.sum(1, keepdim=True) < 0, -1.0, 1.0)  # an eigenvector has no sign of its own
        self.conv1.weight.copy_(torch.cat([kernels, -kernels]).view(24, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.gelu(self.conv1(x)))
        logits: Tensor = self.linear(out.amax((2, 3))) / 9
        return logits


@MODELS.register
def airbench94(num_classes: int) -> nn.Module:
    return Airbench(num_classes, (64, 256, 256), depth=2)


@MODELS.register
def airbench96(num_classes: int) -> nn.Module:
    return Airbench(num_classes, (128, 384, 512), depth=3)
