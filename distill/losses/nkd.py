"""Normalised knowledge distillation (Yang et al. 2023): the teacher's label as a weight, the other classes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.divergence import EXACT_ABOVE, check, divergence, others
from distill.losses.method import Method, ce_weight_option, kd_weight_option, temperature_option, warmup_option
from distill.losses.top_k import TopKLogits, merge
from distill.options import option


def nkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, gamma: float, T: float) -> Tensor:
    """Returns -p_t(y) log p_s(y) - gamma * T^2 * sum over the other classes i of q_t(i) log q_s(i).

    p is the softmax at T = 1, q that over the C - 1 other logits at temperature T. In nats, mean over the images.
    Shapes: logits (B, C), labels (B,). At equality it is not 0 but the entropies of the teacher. Raises ValueError.
    Source: Yang et al. 2023, arXiv:2303.13005.
    """
    check(student_logits, teacher_logits, T, labels)
    label_term = _label_term(student_logits, teacher_logits, labels)
    return label_term + gamma * _others_term(student_logits, teacher_logits, labels, T)


def nkd_top_k(student_logits: Tensor, teacher: TopKLogits, labels: Tensor, *, gamma: float, T: float) -> Tensor:
    """Returns nkd() over the label, k - 1 other classes, and one class for the rest; its first term is exact."""
    first = torch.zeros_like(labels)
    label_term = _label_term(*merge(student_logits, teacher, labels, 1.0), first)
    return label_term + gamma * _others_term(*merge(student_logits, teacher, labels, T), first, T)


def _label_term(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    column = labels.view(-1, 1)
    target = teacher_logits.detach().float().softmax(1).gather(1, column)
    return -(target * F.log_softmax(student_logits.float(), dim=1).gather(1, column)).mean()


def _others_term(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, T: float) -> Tensor:
    student = others(student_logits.float(), labels) / T
    teacher = others(teacher_logits.detach().float(), labels) / T
    target = F.softmax(teacher, dim=1)
    if T > EXACT_ABOVE:
        entropy = torch.special.entr(target).sum(1).mean()
        return T**2 * (entropy + divergence(student, teacher, T))
    return -(T**2) * (target * F.log_softmax(student, dim=1)).sum(1).mean()


@dataclass(frozen=True)
class NKD(Method):
    """The label's term, and the cross-entropy of the other classes."""

    name: ClassVar[str] = "nkd"
    formula: ClassVar[str] = "(-p_t(y) log p_s(y) + gamma * T^2 * CE(other classes))"
    note: ClassVar[str] = "other classes at temperature T"
    source: ClassVar[str] = "Yang et al. 2023, arXiv:2303.13005"
    needs_labels: ClassVar[bool] = True
    supports_top_k: ClassVar[bool] = True
    zero_at_equality: ClassVar[bool] = False

    gamma: float = option(3.5, "weight of the other classes", photos=1.5, least=0)
    T: float = temperature_option(3.0, photos=1.0)
    kd_warmup: float = warmup_option()
    kd_weight: float = kd_weight_option()
    ce_weight: float = ce_weight_option()

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | TopKLogits, labels: Tensor) -> Tensor:
        """Returns the term on logits; see Method."""
        if isinstance(teacher_logits, TopKLogits):
            return nkd_top_k(student_logits, teacher_logits, labels, gamma=self.gamma, T=self.T)
        return nkd(student_logits, teacher_logits, labels, gamma=self.gamma, T=self.T)
