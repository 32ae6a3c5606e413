"""The k largest of a teacher's logits, in place of all, and what a loss needs to use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from distill.lazy import Tensor, torch

TEMPERATURES = (1.0, 2.0, 3.0, 4.0)  # at which the sum over the other classes is kept


class TopKLogits(NamedTuple):
    """What is kept of a teacher's logits (B, C).

    The k largest, `values` (B, k) of `classes` int64 (B, k); the label's, `label` (B,); and of all classes but the k
    largest `rest` (B, 4), logsumexp(logits / T) at T = 1, 2, 3, 4.
    """

    values: Tensor
    classes: Tensor
    label: Tensor
    rest: Tensor


def top_k_logits(logits: Tensor, labels: Tensor, k: int) -> TopKLogits:
    """Returns the TopKLogits of logits (B, C), k < C. A negative label is none; its logit is that of class 0."""
    values, classes = logits.float().topk(k, dim=1)
    others = logits.float().scatter(1, classes, -torch.inf)
    rest = torch.stack([torch.logsumexp(others / T, dim=1) for T in TEMPERATURES], dim=1)
    return TopKLogits(values, classes, logits.float().gather(1, labels.clamp(min=0).view(-1, 1)).squeeze(1), rest)


def rest_at(teacher: TopKLogits, T: float) -> Tensor:
    """Returns logsumexp(logits / T) of all but the k largest, (B,). Raises ValueError for another T than is kept."""
    if T not in TEMPERATURES:
        raise ValueError(f"top-k logits are kept for T 1, 2, 3 and 4, not {T:g}")
    return teacher.rest[:, TEMPERATURES.index(T)]


def merge(student_logits: Tensor, teacher: TopKLogits, labels: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Returns the student's and the teacher's logits with all small classes as one, both (B, k + 1).

    First the label's logit; then those of the k largest without it (where it is not among them, without the smallest of
    them); last that of all other classes as one, whose mass at T is theirs together. Raises ValueError as rest_at does.
    """
    column, count = labels.view(-1, 1), teacher.classes.shape[1]
    values, rest = teacher.values / T, rest_at(teacher, T).unsqueeze(1)
    label = teacher.label.unsqueeze(1) / T
    is_label = teacher.classes == column
    left_out = torch.where(is_label.any(1), is_label.int().argmax(1), count - 1).unsqueeze(1)
    kept = torch.arange(count - 1, device=labels.device).expand(len(labels), -1)
    kept = kept + (kept >= left_out)
    # where the label is one of the rest: without it, and with the one that is left out
    smallest = values.gather(1, left_out)
    others = smallest + torch.log1p((torch.exp(rest - smallest) - torch.exp(label - smallest)).clamp(min=0))
    rest = torch.where(is_label.any(1, keepdim=True), rest, others)
    chosen = torch.cat([column, teacher.classes.gather(1, kept)], dim=1)
    student = student_logits.float() / T
    student_rest = torch.logsumexp(student.scatter(1, chosen, -torch.inf), dim=1, keepdim=True)
    student_merged = torch.cat([student.gather(1, chosen), student_rest], dim=1)
    teacher_merged = torch.cat([label, values.gather(1, kept), rest], dim=1)
    return T * student_merged, T * teacher_merged.detach()


def top_k_error(
    loss: Callable[[Tensor, Any, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    k: int,
) -> float:
    """Returns |g_k - g| / |g|: how far the k largest logits turn the gradient from that with all of them.

    The gradient is that of `loss` on student_logits (B, C).
    """
    student = student_logits.detach().float().requires_grad_()
    (near,) = torch.autograd.grad(loss(student, top_k_logits(teacher_logits, labels, k), labels), student)
    (exact,) = torch.autograd.grad(loss(student, teacher_logits, labels), student)
    return ((near - exact).norm() / exact.norm()).item()
