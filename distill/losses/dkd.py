"""Decoupled knowledge distillation (Zhao et al. 2022): the label's part of KD and the rest, each with its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.divergence import (
    EXACT_ABOVE,
    check,
    divergence,
    divergence_of_gap,
    log_mean_exp,
    others,
    standardize,
)
from distill.losses.method import (
    Method,
    ce_weight_option,
    kd_weight_option,
    standardize_option,
    temperature_option,
    warmup_option,
)
from distill.losses.top_k import TopKLogits, merge
from distill.options import option


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, beta: float, T: float
) -> Tensor:
    """Returns T^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)), in nats, mean over the images.

    b is the distribution over (label, not label) at temperature T, q that over the other classes alone.
    Shapes: logits (B, C), labels (B,). The loss is 0 where the two agree up to a constant. It is computed by logsumexp,
    as 1 - p(label) would be 0 for a student that is sure. Raises ValueError.
    Source: Zhao et al. 2022, arXiv:2203.08679.
    """
    check(student_logits, teacher_logits, T, labels)
    student, teacher = student_logits.float() / T, teacher_logits.detach().float() / T
    binary = _label_divergence(student, teacher, labels, T)
    rest = divergence(others(student, labels), others(teacher, labels), T)
    return T**2 * (alpha * binary + beta * rest)


def _label_divergence(student: Tensor, teacher: Tensor, labels: Tensor, T: float) -> Tensor:
    """Returns KL(b_t || b_s), mean over the images, of logits (B, C) divided by T before."""
    target = _label_or_not(teacher, labels)
    if T <= EXACT_ABOVE:
        return F.kl_div(_label_or_not(student, labels), target, reduction="batchmean", log_target=True)
    gap = student - teacher
    rest = log_mean_exp(others(gap, labels), F.log_softmax(others(teacher, labels), dim=1))
    return divergence_of_gap(torch.stack([gap.gather(1, labels.view(-1, 1)).squeeze(1), rest], dim=1), target)


def _label_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns log (p(label), 1 - p(label)), (B, 2)."""
    label = logits.gather(1, labels.view(-1, 1))
    rest = torch.logsumexp(others(logits, labels), dim=1, keepdim=True)
    return F.log_softmax(torch.cat([label, rest], dim=1), dim=1)


@dataclass(frozen=True)
class DKD(Method):
    """The two parts of the KL term; its authors raise its weight in the first epochs."""

    name: ClassVar[str] = "dkd"
    formula: ClassVar[str] = "T^2 * (alpha * KL(label or not) + beta * KL(other classes))"
    note: ClassVar[str] = "distributions at temperature T"
    source: ClassVar[str] = "Zhao et al. 2022, arXiv:2203.08679"
    needs_labels: ClassVar[bool] = True
    supports_top_k: ClassVar[bool] = True

    alpha: float = option(1.0, "weight of (label, not label)", least=0)
    beta: float = option(8.0, "weight of the other classes", photos=0.5, least=0)
    T: float = temperature_option(4.0, photos=1.0)
    kd_warmup: float = warmup_option(20.0, photos=1.0)
    kd_weight: float = kd_weight_option()
    ce_weight: float = ce_weight_option()
    standardize: bool = standardize_option()

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | TopKLogits, labels: Tensor) -> Tensor:
        """Returns the term on logits; see Method."""
        if isinstance(teacher_logits, TopKLogits):  # over the label, k - 1 other classes, and one class for the rest
            student_logits, teacher_logits = merge(student_logits, teacher_logits, labels, self.T)
            labels = torch.zeros_like(labels)
        elif self.standardize:
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        return dkd(student_logits, teacher_logits, labels, alpha=self.alpha, beta=self.beta, T=self.T)
