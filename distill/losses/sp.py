"""Similarity preserving (Tung and Mori 2019): images that are alike to the teacher are alike to the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import FeatureContext, FeatureMethod, check_maps, feature_weight_option


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns |G_s - G_t|^2 / B^2, a scalar in float32; G is f f^T over the images, its rows L2-normalised.

    Shapes: (B, C, H, W), each of its own C, H, W. No gradient to the teacher. Raises ValueError, for one image too.
    Source: Tung and Mori 2019, arXiv:1907.09682.
    """
    check_maps(student, teacher)
    if len(student) < 2:
        raise ValueError("similarities need two images at least")
    gap = _similarities(student.float()) - _similarities(teacher.detach().float())
    return gap.square().mean()


def _similarities(feature: Tensor) -> Tensor:
    """Returns G (B, B); features are divided by the largest entry of the batch first, which G does not change by."""
    flat = feature.flatten(1)
    return F.normalize(_scaled(flat) @ _scaled(flat).T, dim=1)


def _scaled(flat: Tensor) -> Tensor:
    return flat / flat.detach().abs().max().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class SP(FeatureMethod):
    """The last stage."""

    name: ClassVar[str] = "sp"
    formula: ClassVar[str] = "|G_s - G_t|^2 / B^2 of the last stage; G: f f^T over the batch, rows L2-normalised"
    source: ClassVar[str] = "Tung and Mori 2019, arXiv:1907.09682"
    correlates_images: ClassVar[bool] = True

    feature_weight: float = feature_weight_option(3000.0)

    def choose(self, stages: int) -> Sequence[int]:
        """Returns the last stage."""
        return (stages - 1,)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features; see sp()."""
        return sp(student[0], teacher[0])
