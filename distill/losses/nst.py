"""Neuron selectivity transfer (Huang and Wang 2017): what the channels of a stage are selective for."""

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


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns mean k(t, t) + mean k(s, s) - 2 * mean k(s, t), a scalar in float32: the MMD with k(a, b) = (a . b)^2.

    a, b: channels of an image, L2-normalised over its pixels; means are over pairs of channels and over images.
    Shapes: (B, C, H, W), each of its own C; the larger map is averaged to the size of the smaller. No gradient to the
    teacher. Raises ValueError. Source: Huang and Wang 2017, arXiv:1707.01219.

    It is computed as |M_t - M_s|^2 with M = mean a a^T, (B, H * W, H * W): the three means are nearly alike, and their
    difference in float32 has an error of 3e-5 of itself, as the authors' code has it.
    """
    check_maps(student, teacher)
    own, other = (_second_moments(feature) for feature in pool_pair(student, teacher))
    return (own - other).square().sum((1, 2)).mean()


def _second_moments(feature: Tensor) -> Tensor:
    """Returns M (B, H * W, H * W) of maps (B, C, H, W)."""
    flat = feature.flatten(2)
    largest = flat.detach().abs().amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    channels = F.normalize(flat / largest, dim=2)
    return channels.transpose(1, 2) @ channels / channels.shape[1]


@dataclass(frozen=True)
class NST(FeatureMethod):
    """The last stage."""

    name: ClassVar[str] = "nst"
    formula: ClassVar[str] = "MMD of the last stage's channels, L2-normalised, with the kernel (a . b)^2"
    source: ClassVar[str] = "Huang and Wang 2017, arXiv:1707.01219"

    feature_weight: float = feature_weight_option(50.0)

    def choose(self, stages: int) -> Sequence[int]:
        """Returns the last stage."""
        return (stages - 1,)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features; see nst()."""
        return nst(student[0], teacher[0])
