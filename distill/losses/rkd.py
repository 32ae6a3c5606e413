"""Relational KD (Park et al. 2019): distances and angles between the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import FeatureContext, FeatureMethod, check_vectors, feature_weight_option
from distill.options import option

EPSILON = 1e-12


def rkd(student: Tensor, teacher: Tensor, *, distance: float, angle: float) -> Tensor:
    """Returns distance * L(d_s, d_t) + angle * L(a_s, a_t), L the smooth L1 loss, mean over all entries, in float32.

    d: distances between pairs of images, divided by the mean of those above 0. a: for each triplet (i, j, k) the cosine
    of the angle at i. Shapes: (B, D), each of its own D. No gradient to the teacher. Raises ValueError.
    Source: Park et al. 2019, arXiv:1904.05068.
    """
    check_vectors(student, teacher)
    own, other = _scaled(student.float()), _scaled(teacher.detach().float())
    by_distance = F.smooth_l1_loss(_distances(own), _distances(other))
    return distance * by_distance + angle * F.smooth_l1_loss(_angles(own), _angles(other))


def _scaled(vectors: Tensor) -> Tensor:
    """Returns vectors whose largest entry is 1: neither distances over their mean nor angles change by that."""
    return vectors / vectors.detach().abs().max().clamp(min=torch.finfo(torch.float32).tiny)


def _distances(vectors: Tensor) -> Tensor:
    """Returns (B, B), with 0 on the diagonal."""
    square = vectors.square().sum(1)
    gaps = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * vectors @ vectors.T).clamp(min=EPSILON)
    other = 1 - torch.eye(len(vectors), device=vectors.device)
    distances = gaps.sqrt() * other
    return distances / distances[distances > 0].mean()


def _angles(vectors: Tensor) -> Tensor:
    """Returns (B, B, B): at i, the product of the unit vectors to j and to k."""
    directions = F.normalize(vectors.unsqueeze(0) - vectors.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)


@dataclass(frozen=True)
class RKD(FeatureMethod):
    """What the last layer gets, with a weight for distances and one for angles."""

    name: ClassVar[str] = "rkd"
    formula: ClassVar[str] = "distance * L1(distances over their mean) + angle * L1(angles of triplets); L1 smooth"
    source: ClassVar[str] = "Park et al. 2019, arXiv:1904.05068"
    pooled: ClassVar[bool] = True
    correlates_images: ClassVar[bool] = True

    feature_weight: float = feature_weight_option(1.0)
    distance: float = option(25.0, "weight of the distances between images", group="features", least=0)
    angle: float = option(50.0, "weight of the angles between three images", group="features", least=0)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features; see rkd()."""
        return rkd(student[0], teacher[0], distance=self.distance, angle=self.angle)
