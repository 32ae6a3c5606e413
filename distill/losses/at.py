"""Attention transfer (Zagoruyko and Komodakis 2017): where the student looks, the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import (
    FeatureContext,
    FeatureMethod,
    check_maps,
    feature_weight_option,
    pool_pair,
)


def at(student: Tensor, teacher: Tensor, *, p: float) -> Tensor:
    """Returns the mean over images and pixels of (a_s - a_t)^2, a scalar in float32.

    a: the mean over the channels of |f|^p, divided by its L2 norm over the pixels of an image.
    Shapes: (B, C, H, W), with channels of their own; the larger map is averaged to the size of the smaller. No gradient
    to the teacher. Raises ValueError. Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928.
    """
    check_maps(student, teacher)
    own, other = (_attention(feature, p) for feature in pool_pair(student, teacher))
    return F.mse_loss(own, other)


def _attention(feature: Tensor, p: float) -> Tensor:
    """Returns the attention map (B, H * W); the largest entry of an image is made 1 first, so that no power is inf."""
    largest = feature.detach().abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return F.normalize((feature / largest).abs().pow(p).mean(1).flatten(1), dim=1)


@dataclass(frozen=True)
class AT(FeatureMethod):
    """Every stage, with p = 2 as its authors have it."""

    name: ClassVar[str] = "at"
    formula: ClassVar[str] = "sum over stages of mean (a_s - a_t)^2; a: mean of squares over channels, L2-normalised"
    source: ClassVar[str] = "Zagoruyko and Komodakis 2017, arXiv:1612.03928"

    feature_weight: float = feature_weight_option(1000.0)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the sum of at() over the stages."""
        return torch.stack([at(own, other, p=2) for own, other in zip(student, teacher, strict=True)]).sum()
