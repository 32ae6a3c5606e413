"""Overhaul feature distillation (Heo et al. 2019): the student's features learn the teacher's.

Features are taken before the last activation of each stage; distill/features/ finds and connects them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill.lazy import Tensor, torch
from distill.losses.feature_method import (
    FeatureContext,
    FeatureMethod,
    Shape,
    connector,
    feature_weight_option,
    pool_alike,
)
from distill.losses.method import Method, ce_weight_option
from distill.options import option

if TYPE_CHECKING:
    from torch import nn


def overhaul(student: Sequence[Tensor], teacher: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """Returns the sum over the stages i of L of partial_l2(s_i, t_i, m_i) / (2^(L - 1 - i) * B).

    Shapes: features (B, C_i, H_i, W_i), margins (C_i,). Source: Heo et al. 2019, arXiv:1904.01866.
    """
    total = torch.zeros((), device=student[0].device)
    for stage, (own, target, margin) in enumerate(zip(student, teacher, margins, strict=True)):
        total = total + partial_l2(own, target, margin) / 2 ** (len(student) - 1 - stage)
    return total / len(student[0])


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Returns the sum over all elements of (s - t')^2 with t' = max(t, margin), without those where s <= t' <= 0.

    student, teacher: (B, C, H, W), the teacher's raw feature; margin: (C,) -> scalar, computed in float32. The gradient
    goes to the student alone. Raises ValueError if the shapes do not fit.
    """
    if student.dim() != 4 or student.shape != teacher.shape or margin.shape != student.shape[1:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (student, teacher, margin))
        raise ValueError(f"features must both be (B, C, H, W) and the margin (C,), got {shapes}")
    own = student.float()
    target = torch.maximum(teacher.detach().float(), margin.detach().float().view(1, -1, 1, 1))
    counts = (own > target) | (target > 0)
    return ((own - target) ** 2 * counts).sum()


def margin(gamma: Tensor, beta: Tensor) -> Tensor:
    """Returns the mean of the negative part of a normal distribution, of mean beta and deviation |gamma|, per channel.

    m = mu - sigma * phi(mu / sigma) / Phi(-mu / sigma), and -3 sigma where hardly anything is negative
    (Phi(-mu / sigma) <= 0.001); where sigma is 0, min(mu, 0).
    gamma, beta: (C,), weight and bias of a BatchNorm -> float32 (C,).
    """
    mu, sigma = beta.detach().double(), gamma.detach().double().abs()
    ratio = mu / sigma.clamp(min=torch.finfo(torch.float64).tiny)
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    mean = torch.where(negative > 0.001, mu - sigma * density / negative.clamp(min=1e-3), -3 * sigma)
    return torch.where(sigma > 0, mean, mu.clamp(max=0)).float()


@dataclass(frozen=True)
class Overhaul(FeatureMethod):
    """The loss of this repository on features: every stage, before its last activation, through a connector."""

    name: ClassVar[str] = "overhaul"
    formula: ClassVar[str] = "sum over stages of partial_l2 / (2^(stages after it) * B)"
    source: ClassVar[str] = "Heo et al. 2019, arXiv:1904.01866"
    learns: ClassVar[str] = "a 1x1 convolution and BatchNorm a stage"
    before_activation: ClassVar[bool] = True

    feature_weight: float = feature_weight_option(1e-3, photos=1e-4)
    teacher_bn: str = option(
        "eval",
        "statistics that the teacher's BatchNorm uses for features: its own (eval), or the batch's, as the authors "
        "have it",
        group="features",
        choices=("eval", "batch"),
    )

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> nn.Module:
        """Returns a connector for each stage."""
        pairs = zip(student, teacher, strict=True)
        return torch.nn.ModuleList(connector(own[0], other[0]) for own, other in pairs)

    def connect(self, learned: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Returns the student's features as the teacher's are; a larger map is averaged to its size first."""
        return [part(own) for part, own in zip(learned, pool_alike(student, teacher), strict=True)]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features; see overhaul()."""
        return overhaul(student, pool_alike(teacher, student), context.margins)


@dataclass(frozen=True)
class NoLogits(Method):
    """Cross-entropy in place of the teacher's logits, for methods on features alone."""

    name: ClassVar[str] = "none"
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_teacher_logits: ClassVar[bool] = False

    ce_weight: float = ce_weight_option()
