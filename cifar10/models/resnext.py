"""ResNeXt-29 for 32x32 images: three stages of three grouped bottlenecks. Xie et al. 2016, arXiv:1611.05431.

`resnext29_32x4d` means 32 groups of 4 channels in the first stage; the width doubles from stage to stage.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.models.registry import MODELS
from cifar10.models.resnet import Bottleneck


class ResNeXt(nn.Module):
    """A stem of stride 1, three stages of grouped bottlenecks, the mean over the image, and a linear layer."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, cardinality: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 1, bias=False)  # 1x1, as in the reference; the paper has 3x3
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for stage in range(3):
            channels = cardinality * width * 2**stage
            blocks = []
            for i in range(3):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Bottleneck(in_channels, channels, stride, groups=cardinality, out_channels=2 * channels))
                in_channels = 2 * channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@MODELS.register
def resnext29_2x64d(num_classes: int) -> nn.Module:
    return ResNeXt(2, 64, num_classes)


@MODELS.register
def resnext29_4x64d(num_classes: int) -> nn.Module:
    return ResNeXt(4, 64, num_classes)


@MODELS.register
def resnext29_8x64d(num_classes: int) -> nn.Module:
    return ResNeXt(8, 64, num_classes)


@MODELS.register
def resnext29_32x4d(num_classes: int) -> nn.Module:
    return ResNeXt(32, 4, num_classes)


@MODELS.register
def resnext29_32x8d(num_classes: int) -> nn.Module:
    return ResNeXt(32, 8, num_classes)
