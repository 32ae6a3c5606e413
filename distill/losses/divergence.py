"""Numerics that the losses share: divergences of distributions that may be almost alike, of logits (B, C).

All compute in float32, in nats; shapes that do not fit raise ValueError.
"""

from __future__ import annotations

from distill.lazy import F, Tensor, torch

EXACT_ABOVE = 10.0  # temperature from which on a difference of logarithms, times T^2, would be rounding noise


def divergence(student: Tensor, teacher: Tensor, T: float) -> Tensor:
    """Returns KL(softmax(teacher) || softmax(student)), mean over the images, of logits (B, C) divided by T before."""
    log_p = F.log_softmax(teacher, dim=1)
    if T > EXACT_ABOVE:
        return divergence_of_gap(student - teacher, log_p)
    # batchmean: the default 'mean' would divide by the number of classes as well.
    return F.kl_div(F.log_softmax(student, dim=1), log_p, reduction="batchmean", log_target=True)


def divergence_of_gap(gap: Tensor, log_p: Tensor) -> Tensor:
    """Returns KL(p || q) for q = softmax(log p + gap), mean over the images, to 1e-5 of its value.

    Shapes: (B, C). p and q may be as alike as they will: it is computed as sum p (q/p - 1 - log(q/p)), whose first two
    terms add up to nothing. No term is negative, none cancels another, and none is larger than max(1, |gap|). The
    gradient towards the gap is q - p.
    """
    with torch.no_grad():
        ratio, p = gap - log_mean_exp(gap, log_p).unsqueeze(1), log_p.exp()  # log(q / p)
        q = torch.exp(log_p + ratio)
        near = ratio.abs() < 0.5
        x = ratio.clamp(-0.5, 0.5)
        series = 1 + x / 3 * (
            1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))
        )  # (e^x - 1 - x) / (x^2 / 2)
        value = torch.where(near, p * x * x / 2 * series, q - p - p * ratio).sum(1)
        slope = torch.where(near, p * torch.expm1(x), q - p)
    return _with_slope(value, slope, gap).mean()


def log_mean_exp(gap: Tensor, log_p: Tensor) -> Tensor:
    """Returns log sum p e^gap, (B, C), (B, C) -> (B,), also where the gap is so small that the sum rounds to 1."""
    with torch.no_grad():
        p = log_p.exp()
        mean = (p * gap).sum(1, keepdim=True) / p.sum(1, keepdim=True)
        centred = gap - mean
        small = torch.log1p((p * torch.expm1(centred)).sum(1))
        excess = torch.where(centred.amax(1) < 1, small, torch.logsumexp(log_p + centred, dim=1))
        slope = F.softmax(log_p + centred, dim=1)
    return _with_slope(mean.squeeze(1) + excess, slope, gap)


def _with_slope(value: Tensor, slope: Tensor, argument: Tensor) -> Tensor:
    """Returns `value` (B,) with the gradient `slope` (B, C) towards `argument` (B, C)."""
    term = (slope * argument).sum(1)
    return value + (term - term.detach())


def check(student_logits: Tensor, teacher_logits: Tensor, T: float, labels: Tensor | None = None) -> None:
    """Raises ValueError unless logits are (B, C) alike, labels (B,), and T is above 0."""
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student and teacher logits must both be (B, C), got {shapes}")
    if not T > 0:
        raise ValueError(f"temperature must be above 0, got {T}")
    if labels is not None and labels.shape != student_logits.shape[:1]:
        raise ValueError(f"labels must be ({len(student_logits)},), got {tuple(labels.shape)}")


def standardize(logits: Tensor) -> Tensor:
    """Returns (z - mean) / (deviation + 1e-7) for each image, over its classes: (B, C) -> float32.

    With the unbiased deviation. Applied to student and teacher before the loss. Logits that are all alike have large
    gradients, as their deviation is 0: objectives.start_last_layer. Source: Sun et al. 2024, arXiv:2403.01427.
    """
    values = logits.float()
    return (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-7)


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns all logits but the label's, (B, C - 1)."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, columns + (columns >= labels.view(-1, 1)))
