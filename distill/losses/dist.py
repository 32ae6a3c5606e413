"""DIST (Huang et al. 2022): correlation with the teacher, across classes and across images, in place of KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.divergence import EXACT_ABOVE, check, log_mean_exp
from distill.losses.method import Method, ce_weight_option, kd_weight_option, temperature_option, warmup_option
from distill.losses.top_k import TopKLogits
from distill.options import option


def dist(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, T: float) -> Tensor:
    """Returns T^2 * (beta * (1 - mean over images of r_i) + gamma * (1 - mean over classes of r_c)).

    r_i is the Pearson correlation of softmax(s / T) and softmax(t / T) across the classes, r_c that across the images
    of the batch. Shapes: (B, C). The loss is 0 where the two agree, but for classes without variance in the batch,
    whose r is 0, and the authors' 1e-8 in the denominator. For gamma > 0 it is a function of the batch as a whole.
    Raises ValueError. Source: Huang et al. 2022, arXiv:2205.10536.
    """
    check(student_logits, teacher_logits, T)
    student, teacher = (_probabilities(logits.float(), T) for logits in (student_logits, teacher_logits.detach()))
    between, within = _uncorrelated(student, teacher, T), _uncorrelated(student.T, teacher.T, T)
    return T**2 * (beta * between + gamma * within)


def _probabilities(logits: Tensor, T: float) -> Tensor:
    """Returns softmax(logits / T), (B, C); at a high T less 1 / C, beside which what differs is rounded away."""
    scaled, classes = logits / T, logits.shape[1]
    if T <= EXACT_ABOVE:
        return F.softmax(scaled, dim=1)
    uniform = torch.full_like(scaled, -math.log(classes))
    return torch.expm1(scaled - log_mean_exp(scaled, uniform).unsqueeze(1)) / classes


def _uncorrelated(one: Tensor, other: Tensor, T: float) -> Tensor:
    """Returns 1 - Pearson's correlation of each row, (N, M), (N, M), mean over the rows; 1 without variance."""
    one, other = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    lengths = one.norm(dim=1) * other.norm(dim=1)
    if T <= EXACT_ABOVE:
        return 1 - ((one * other).sum(1) / (lengths + 1e-8)).mean()
    apart = (F.normalize(one) - F.normalize(other)).square().sum(1) / 2  # 1 - cos, where 1 less a cosine is rounding
    return ((lengths * apart + 1e-8) / (lengths + 1e-8)).mean()


@dataclass(frozen=True)
class DIST(Method):
    """Correlations in place of KL: it wants several images at once."""

    name: ClassVar[str] = "dist"
    formula: ClassVar[str] = "T^2 * (beta * (1 - r across classes) + gamma * (1 - r across images))"
    note: ClassVar[str] = "r of softmax(s/T) and softmax(t/T)"
    source: ClassVar[str] = "Huang et al. 2022, arXiv:2205.10536"
    correlates_images: ClassVar[bool] = True
    divides_by_deviation: ClassVar[bool] = True

    beta: float = option(1.0, "weight of the classes' correlation", least=0)
    gamma: float = option(1.0, "weight of the images' correlation", least=0)
    T: float = temperature_option(4.0, photos=1.0)
    kd_warmup: float = warmup_option()
    kd_weight: float = kd_weight_option(2.0)
    ce_weight: float = ce_weight_option()

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | TopKLogits, labels: Tensor) -> Tensor:
        """Returns the term on logits; see Method."""
        assert not isinstance(teacher_logits, TopKLogits)
        return dist(student_logits, teacher_logits, beta=self.beta, gamma=self.gamma, T=self.T)
