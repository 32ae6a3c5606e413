"""Variational information distillation (Ahn et al. 2019): stages predict the teacher's, with a variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import (
    FeatureContext,
    FeatureMethod,
    Shape,
    check_maps,
    feature_weight_option,
    pool_alike,
)

if TYPE_CHECKING:
    from torch import nn

START, EPSILON = 5.0, 1e-5  # its authors': the variance at first, and the least one


def vid(mean: Tensor, teacher: Tensor, softplus: Tensor) -> Tensor:
    """Returns the mean over all elements of ((mean - t)^2 / v + log v) / 2 with v = log(1 + exp(softplus)) + 1e-5.

    Shapes: mean, teacher (B, C, H, W); softplus (B, C), the same for every image. In float32, no gradient to the
    teacher. Raises ValueError. Source: Ahn et al. 2019, arXiv:1904.05835.
    """
    check_maps(mean, teacher, same=True)
    if softplus.shape != mean.shape[:2]:
        raise ValueError(f"the variance must be (B, C) = {tuple(mean.shape[:2])}, got {tuple(softplus.shape)}")
    variance = (F.softplus(softplus.float()) + EPSILON).view(*softplus.shape, 1, 1)
    return (0.5 * ((mean.float() - teacher.detach().float()).square() / variance + variance.log())).mean()


@dataclass(frozen=True)
class VID(FeatureMethod):
    """Every stage; the mean is three 1x1 convolutions of the student's, the variance a number a channel."""

    name: ClassVar[str] = "vid"
    formula: ClassVar[str] = "sum over stages of mean ((m(s) - t)^2 / v + log v) / 2"
    source: ClassVar[str] = "Ahn et al. 2019, arXiv:1904.05835"
    learns: ClassVar[str] = "m: three 1x1 convolutions a stage; v: a variance a channel"

    feature_weight: float = feature_weight_option(1.0)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> nn.Module:
        """Returns for each stage the convolutions, and the variance as softplus has it."""
        start = math.log(math.exp(START - EPSILON) - 1)
        parts = torch.nn.ModuleList()
        for own, other in zip(student, teacher, strict=True):
            part = torch.nn.Module()
            part.mean = _regressor(own[0], other[0])
            part.softplus = torch.nn.Parameter(torch.full((other[0],), start))
            parts.append(part)
        return parts

    def connect(self, learned: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Returns for each stage the mean (B, C, H, W), then for each the variance (B, C), as softplus has it."""
        means = [part.mean(own) for part, own in zip(learned, pool_alike(student, teacher), strict=True)]
        return means + [part.softplus.expand(len(own), -1) for part, own in zip(learned, student, strict=True)]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the sum of vid() over the stages."""
        means, variances = student[: len(teacher)], student[len(teacher) :]
        stages = zip(means, pool_alike(teacher, means), variances, strict=True)
        return torch.stack([vid(*stage) for stage in stages]).sum()


def _regressor(in_channels: int, out_channels: int) -> nn.Module:
    convolutions = [
        torch.nn.Conv2d(channels, out_channels, 1, bias=False) for channels in (in_channels, out_channels, out_channels)
    ]
    first, second, third = convolutions
    return torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), third)
