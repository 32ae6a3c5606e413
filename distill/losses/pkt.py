"""Probabilistic knowledge transfer (Passalis and Tefas 2018): who is near whom in a batch, as probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import FeatureContext, FeatureMethod, check_vectors, feature_weight_option

EPSILON = 1e-7  # its authors', under a logarithm and in a norm


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over pairs of images of p_t * log(p_t / p_s), a scalar in float32.

    p: (1 + cosine) / 2 of each pair, over the sum of its row. Shapes: (B, D), each of its own D. No gradient to the
    teacher. Raises ValueError. Source: Passalis and Tefas 2018, arXiv:1803.10837.
    """
    check_vectors(student, teacher)
    own, other = _probabilities(student.float()), _probabilities(teacher.detach().float())
    return (other * torch.log((other + EPSILON) / (own + EPSILON))).mean()


def _probabilities(vectors: Tensor) -> Tensor:
    """Returns (B, B), each row of sum 1."""
    largest = vectors.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    unit = F.normalize(vectors / largest, dim=1)
    similar = (unit @ unit.T + 1) / 2
    return similar / similar.sum(1, keepdim=True)


@dataclass(frozen=True)
class PKT(FeatureMethod):
    """What the last layer gets."""

    name: ClassVar[str] = "pkt"
    formula: ClassVar[str] = "mean p_t log(p_t / p_s) over pairs of images; p: cosines as probabilities, row by row"
    source: ClassVar[str] = "Passalis and Tefas 2018, arXiv:1803.10837"
    pooled: ClassVar[bool] = True
    correlates_images: ClassVar[bool] = True

    feature_weight: float = feature_weight_option(30000.0)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features; see pkt()."""
        return pkt(student[0], teacher[0])
