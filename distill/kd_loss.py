"""The loss of Hinton's distillation on logits: pure functions of tensors."""

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
