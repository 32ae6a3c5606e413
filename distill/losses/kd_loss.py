"""Losses of distillation on logits: pure functions of tensors. All compute in float32 and are means over the images, in
nats; the gradient goes to the student alone; shapes that do not fit raise ValueError.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_ABOVE = 10.0  # temperature from which on a difference of logarithms, times T^2, would be rounding noise


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), in nats, mean over the images.

    Shapes: both (B, C); computed in float32 whatever comes in, the gradient goes to the student alone. T^2 keeps the
    size of the gradient when T changes. 0 where the two agree up to a constant, otherwise positive.
    Raises ValueError if the shapes differ or T <= 0.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    _check(student_logits, teacher_logits, temperature)
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    return temperature**2 * _divergence(student, teacher, temperature)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of logits (B, C) that are divided by T, mean over the images."""
    known = F.log_softmax(teacher, dim=1)
    if temperature > EXACT_ABOVE:
        return _divergence_of_gap(student - teacher, known)
    # batchmean: the default 'mean' would divide by the number of classes as well.
    return F.kl_div(F.log_softmax(student, dim=1), known, reduction="batchmean", log_target=True)


def _divergence_of_gap(gap: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) for q = softmax(log p + gap), both (B, C), mean over the images: to 1e-5 of its value however alike
    p and q are.

    It is sum p (q/p - 1 - log(q/p)), as the first two terms add up to nothing: no term is negative, none cancels
    another, and none is larger than max(1, |gap|). The gradient towards the gap is q - p.
    """
    with torch.no_grad():
        ratio, p = gap - _log_mean_exp(gap, log_p).unsqueeze(1), log_p.exp()  # log(q / p)
        q = torch.exp(log_p + ratio)
        near = ratio.abs() < 0.5
        x = ratio.clamp(-0.5, 0.5)
        series = 1 + x / 3 * (
            1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))
        )  # (e^x - 1 - x) / (x^2 / 2)
        value = torch.where(near, p * x * x / 2 * series, q - p - p * ratio).sum(1)
        slope = torch.where(near, p * torch.expm1(x), q - p)
    return _with_slope(value, slope, gap).mean()


def _log_mean_exp(gap: Tensor, log_p: Tensor) -> Tensor:
    """Log sum p e^gap, (B, C), (B, C) -> (B,): also where the gap is so small that the sum rounds to 1."""
    with torch.no_grad():
        p = log_p.exp()
        mean = (p * gap).sum(1, keepdim=True) / p.sum(1, keepdim=True)
        centred = gap - mean
        small = torch.log1p((p * torch.expm1(centred)).sum(1))
        excess = torch.where(centred.amax(1) < 1, small, torch.logsumexp(log_p + centred, dim=1))
        slope = F.softmax(log_p + centred, dim=1)
    return _with_slope(mean.squeeze(1) + excess, slope, gap)


def _with_slope(value: Tensor, slope: Tensor, argument: Tensor) -> Tensor:
    """`value` (B,), with the gradient `slope` (B, C) towards `argument` (B, C)."""
    term = (slope * argument).sum(1)
    return value + (term - term.detach())


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float, labels: Tensor | None = None) -> None:
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must both be (B, C), got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if labels is not None and labels.shape != student_logits.shape[:1]:
        raise ValueError(f"labels must be ({len(student_logits)},), got {tuple(labels.shape)}")


def dkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)), b the two-class distribution (label, not label) at
    temperature T and q that over the other classes alone.

    Shapes: logits (B, C), labels (B,). 0 where the two agree up to a constant. Computed by logsumexp: 1 - p(label)
    would be 0 for a student that is sure. Raises ValueError.
    Source: Zhao et al. 2022, arXiv:2203.08679.
    """
    _check(student_logits, teacher_logits, temperature, labels)
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    binary = _label_divergence(student, teacher, labels, temperature)
    rest = _divergence(_others(student, labels), _others(teacher, labels), temperature)
    return temperature**2 * (alpha * binary + beta * rest)


def _label_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL(b_t || b_s) of logits (B, C) that are divided by T, mean over the images, b the distribution over (label, not
    label).
    """
    known = _label_or_not(teacher, labels)
    if temperature <= EXACT_ABOVE:
        return F.kl_div(_label_or_not(student, labels), known, reduction="batchmean", log_target=True)
    gap = student - teacher
    others = _log_mean_exp(_others(gap, labels), F.log_softmax(_others(teacher, labels), dim=1))
    return _divergence_of_gap(torch.stack([gap.gather(1, labels.view(-1, 1)).squeeze(1), others], dim=1), known)


def nkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """-p_t(y) log p_s(y) at T = 1, and -gamma * T^2 * sum over the other classes i of q_t(i) log q_s(i), q the softmax
    over the C - 1 other logits at temperature T.

    Shapes: logits (B, C), labels (B,). At equality not 0 but the entropies of the teacher. Raises ValueError.
    Source: Yang et al. 2023, arXiv:2303.13005.
    """
    _check(student_logits, teacher_logits, temperature, labels)
    return _nkd_label(student_logits, teacher_logits, labels) + gamma * _nkd_others(
        student_logits, teacher_logits, labels, temperature
    )


def _nkd_label(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    column = labels.view(-1, 1)
    known = teacher_logits.detach().float().softmax(1).gather(1, column)
    return -(known * F.log_softmax(student_logits.float(), dim=1).gather(1, column)).mean()


def _nkd_others(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logits = (student_logits.float(), teacher_logits.detach().float())
    student, teacher = (_others(some, labels) / temperature for some in logits)
    known = F.softmax(teacher, dim=1)
    if temperature > EXACT_ABOVE:
        entropy = torch.special.entr(known).sum(1).mean()
        return temperature**2 * (entropy + _divergence(student, teacher, temperature))
    rest = known * F.log_softmax(student, dim=1)
    return -(temperature**2) * rest.sum(1).mean()


def dist(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, tau: float) -> Tensor:
    """tau^2 * (beta * (1 - mean over images of r_i) + gamma * (1 - mean over classes of r_c)), r_i the Pearson
    correlation of softmax(s / tau) and softmax(t / tau) across the classes, r_c that across the images of the batch.

    Shapes: (B, C). 0 where the two agree, but for classes without variance in the batch, whose r is 0, and the authors'
    1e-8 in the denominator; for gamma > 0 a function of the batch as a whole. Raises ValueError.
    Source: Huang et al. 2022, arXiv:2205.10536.
    """
    _check(student_logits, teacher_logits, tau)
    student, teacher = (_shares(logits.float(), tau) for logits in (student_logits, teacher_logits.detach()))
    between, within = _uncorrelated(student, teacher, tau), _uncorrelated(student.T, teacher.T, tau)
    return tau**2 * (beta * between + gamma * within)


def _shares(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T), (B, C); at a high T less 1 / C, beside which what differs would be rounded away."""
    scaled, classes = logits / temperature, logits.shape[1]
    if temperature <= EXACT_ABOVE:
        return F.softmax(scaled, dim=1)
    uniform = torch.full_like(scaled, -math.log(classes))
    return torch.expm1(scaled - _log_mean_exp(scaled, uniform).unsqueeze(1)) / classes


def standardize(logits: Tensor) -> Tensor:
    """(z - mean) / (deviation + 1e-7) for each image, over its classes, with the unbiased deviation: (B, C) -> float32.

    Applied to student and teacher before kd or dkd. Logits that are all alike have large gradients, as the deviation is
    0 there: objectives.start_last_layer. Source: Sun et al. 2024, arXiv:2403.01427.
    """
    values = logits.float()
    return (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-7)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C - 1): all logits but the label's."""
    places = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, places + (places >= labels.view(-1, 1)))


def _label_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Log (p(label), 1 - p(label)): (B, 2)."""
    label = logits.gather(1, labels.view(-1, 1))
    others = torch.logsumexp(_others(logits, labels), dim=1, keepdim=True)
    return F.log_softmax(torch.cat([label, others], dim=1), dim=1)


def _uncorrelated(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """1 - Pearson's correlation of each row, (N, M), (N, M), mean over the rows. A row without variance has none: 1."""
    one, other = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    lengths = one.norm(dim=1) * other.norm(dim=1)
    if temperature <= EXACT_ABOVE:
        return 1 - ((one * other).sum(1) / (lengths + 1e-8)).mean()
    apart = (F.normalize(one) - F.normalize(other)).square().sum(1) / 2  # 1 - cos, where 1 less a cosine is rounding
    return ((lengths * apart + 1e-8) / (lengths + 1e-8)).mean()


TEMPERATURES = (1.0, 2.0, 3.0, 4.0)  # at which a top-k answer knows what the other classes have


class TopKLogits(NamedTuple):
    """What is kept of a teacher's logits (B, C): the k largest, `values` (B, k) of `classes` int64 (B, k), that of the
    label (B,), and of all classes but the k largest `rest` (B, 4), logsumexp(logits / T) at T = 1, 2, 3, 4.
    """

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
    rest = _rest(teacher, temperature).unsqueeze(1)
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    others = torch.logsumexp(student.scatter(1, teacher.classes, -torch.inf), dim=1, keepdim=True)
    student = torch.cat([student.gather(1, teacher.classes), others], dim=1)
    known = F.log_softmax(torch.cat([teacher.values / temperature, rest], dim=1).detach(), dim=1)
    return temperature**2 * F.kl_div(student, known, reduction="batchmean", log_target=True)


def dkd_top_k(
    student_logits: Tensor, teacher: TopKLogits, labels: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """dkd() over the label, k - 1 other classes, and one class for all the rest together."""
    merged = _merged(student_logits, teacher, labels, temperature)
    return dkd(*merged, torch.zeros_like(labels), alpha=alpha, beta=beta, temperature=temperature)


def nkd_top_k(
    student_logits: Tensor, teacher: TopKLogits, labels: Tensor, *, gamma: float, temperature: float
) -> Tensor:
    """nkd() over the label, k - 1 other classes, and one class for all the rest together; its first term is exact."""
    first = torch.zeros_like(labels)
    label = _nkd_label(*_merged(student_logits, teacher, labels, 1.0), first)
    return label + gamma * _nkd_others(*_merged(student_logits, teacher, labels, temperature), first, temperature)


def _rest(teacher: TopKLogits, temperature: float) -> Tensor:
    """(B,): logsumexp(logits / T) of all but the k largest. Raises ValueError."""
    if temperature not in TEMPERATURES:
        raise ValueError(f"top-k answers are kept for T 1, 2, 3 and 4, not {temperature:g}")
    return teacher.rest[:, TEMPERATURES.index(temperature)]


def _merged(student_logits: Tensor, teacher: TopKLogits, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits, both (B, k + 1): of the label, of the k largest without it (where it is not among
    them, without the smallest of them), and of all other classes as one, whose mass at T is theirs together.
    """
    column, count = labels.view(-1, 1), teacher.classes.shape[1]
    known, rest = teacher.values / temperature, _rest(teacher, temperature).unsqueeze(1)
    label = teacher.label.unsqueeze(1) / temperature
    found = teacher.classes == column
    left_out = torch.where(found.any(1), found.int().argmax(1), count - 1).unsqueeze(1)
    places = torch.arange(count - 1, device=labels.device).expand(len(labels), -1)
    places = places + (places >= left_out)
    # where the label is one of the rest: without it, and with the one that is left out
    smallest = known.gather(1, left_out)
    others = smallest + torch.log1p((torch.exp(rest - smallest) - torch.exp(label - smallest)).clamp(min=0))
    rest = torch.where(found.any(1, keepdim=True), rest, others)
    chosen = torch.cat([column, teacher.classes.gather(1, places)], dim=1)
    student = student_logits.float() / temperature
    unseen = torch.logsumexp(student.scatter(1, chosen, -torch.inf), dim=1, keepdim=True)
    mine = torch.cat([student.gather(1, chosen), unseen], dim=1)
    theirs = torch.cat([label, known.gather(1, places), rest], dim=1)
    return temperature * mine, temperature * theirs.detach()


def top_k_error(
    loss: Callable[[Tensor, Any, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    k: int,
) -> float:
    """|g_k - g| / |g|: how far the gradient of `loss` on student_logits (B, C) is with the k largest of the teacher's
    logits from that with all of them.
    """
    student = student_logits.detach().float().requires_grad_()
    (near,) = torch.autograd.grad(loss(student, top_k_logits(teacher_logits, labels, k), labels), student)
    (exact,) = torch.autograd.grad(loss(student, teacher_logits, labels), student)
    return ((near - exact).norm() / exact.norm()).item()
