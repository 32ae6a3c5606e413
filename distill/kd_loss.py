"""The loss of Hinton's distillation on logits: pure functions of tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), in nats, mean over the images.

    Shapes: both (B, C); computed in float32 whatever comes in, the gradient goes to the student alone. T^2 keeps the
    size of the gradient when T changes. 0 where the two agree up to a constant, otherwise positive.
    Raises ValueError if the shapes differ or T <= 0.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must both be (B, C), got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    # batchmean: the default 'mean' would divide by the number of classes as well.
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


TEMPERATURES = (1.0, 2.0, 3.0, 4.0)  # at which a top-k answer knows what the other classes have


class TopKLogits(NamedTuple):
    """What is kept of a teacher's logits (B, C): the k largest, `values` (B, k) of `classes` int64 (B, k), that of the
    label (B,), and of all classes but the k largest `rest` (B, 4), logsumexp(logits / T) at T = 1, 2, 3, 4."""

    values: Tensor
    classes: Tensor
    label: Tensor
    rest: Tensor


def top_k_logits(logits: Tensor, labels: Tensor, k: int) -> TopKLogits:
    """The TopKLogits of logits (B, C), k < C; negative labels are no labels, and their logit is that of class 0."""
    values, classes = logits.float().topk(k, dim=1)
    others = logits.float().scatter(1, classes, -torch.inf)
    rest = torch.stack([torch.logsumexp(others / T, dim=1) for T in TEMPERATURES], dim=1)
    return TopKLogits(values, classes, logits.float().gather(1, labels.clamp(min=0).view(-1, 1)).squeeze(1), rest)


def kd_top_k(student_logits: Tensor, teacher: TopKLogits, *, temperature: float) -> Tensor:
    """kd() between the distributions over the teacher's k largest classes and one class for all the others together.

    In nats, mean over the images; never more than kd() of all logits, and equal to it where teacher and student share
    out the rest alike. Raises ValueError for a temperature other than 1, 2, 3, 4.
    """
    if temperature not in TEMPERATURES:
        raise ValueError(f"top-k answers are kept for T 1, 2, 3 and 4, not {temperature:g}")
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    others = torch.logsumexp(student.scatter(1, teacher.classes, -torch.inf), dim=1, keepdim=True)
    student = torch.cat([student.gather(1, teacher.classes), others], dim=1)
    rest = teacher.rest[:, TEMPERATURES.index(temperature)].unsqueeze(1)
    known = F.log_softmax(torch.cat([teacher.values / temperature, rest], dim=1).detach(), dim=1)
    return temperature**2 * F.kl_div(student, known, reduction="batchmean", log_target=True)


def top_k_error(student_logits: Tensor, teacher_logits: Tensor, *, k: int, temperature: float) -> float:
    """|g_k - g| / |g|: how far the gradient of kd_top_k() on student_logits (B, C) is from that of kd()."""
    student = student_logits.detach().float().requires_grad_()
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    known = top_k_logits(teacher_logits, labels, k)
    (near,) = torch.autograd.grad(kd_top_k(student, known, temperature=temperature), student)
    (exact,) = torch.autograd.grad(kd(student, teacher_logits, temperature=temperature), student)
    return ((near - exact).norm() / exact.norm()).item()
