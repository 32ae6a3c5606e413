"""FitNets (Romero et al. 2015): a middle stage of the student predicts the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill.lazy import F, Tensor
from distill.losses.feature_method import (
    FeatureContext,
    FeatureMethod,
    Shape,
    check_maps,
    connector,
    feature_weight_option,
    pool_alike,
)

if TYPE_CHECKING:
    from torch import nn


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over all elements of (s - t)^2, a scalar in float32.

    Shapes: (B, C, H, W) both; no gradient to the teacher. Raises ValueError. Source: Romero et al. 2015,
    arXiv:1412.6550.
    """
    check_maps(student, teacher, same=True)
    return F.mse_loss(student.float(), teacher.detach().float())


@dataclass(frozen=True)
class FitNet(FeatureMethod):
    """The second stage, through a connector; larger maps are averaged to the size of the smaller."""

    name: ClassVar[str] = "fitnet"
    formula: ClassVar[str] = "mean (r(s) - t)^2 of the second stage"
    source: ClassVar[str] = "Romero et al. 2015, arXiv:1412.6550"
    learns: ClassVar[str] = "r: a 1x1 convolution and BatchNorm"

    feature_weight: float = feature_weight_option(100.0)

    def choose(self, stages: int) -> Sequence[int]:
        """Returns the second stage."""
        return (min(1, stages - 1),)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> nn.Module:
        """Returns the connector."""
        return connector(student[0][0], teacher[0][0])

    def connect(self, learned: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Returns the student's stage as the teacher's is."""
        return [learned(own) for own in pool_alike(student, teacher)]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features; see fitnet()."""
        return fitnet(student[0], pool_alike(teacher, student)[0])
