"""Knowledge distillation (Hinton et al. 2015): the loss of this repository, and the default of --method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distill.errors import UserError
from distill.lazy import F, Tensor, torch
from distill.losses.divergence import check, divergence, standardize
from distill.losses.method import (
    Method,
    ce_weight_option,
    kd_weight_option,
    standardize_option,
    temperature_option,
)
from distill.losses.top_k import TopKLogits, rest_at
from distill.options import option


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, T: float = 3.0, w: float = 0.8
) -> Tensor:
    """Returns w * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - w) * CE(student, labels).

    Shapes: logits (B, C), labels int64 (B,). A scalar in nats, mean over the images. Raises ValueError as kd() does.
    """
    kd_term = kd(student_logits, teacher_logits, T=T)
    return w * kd_term + (1 - w) * F.cross_entropy(student_logits.float(), labels)


def kd(student_logits: Tensor, teacher_logits: Tensor, *, T: float) -> Tensor:
    """Returns T^2 * KL(softmax(teacher / T) || softmax(student / T)), in nats, mean over the images.

    Shapes: both (B, C). It computes in float32 whatever comes in, and the gradient goes to the student alone. T^2 keeps
    the size of the gradient when T changes. The loss is 0 where the two agree up to a constant, otherwise positive.
    Raises ValueError if the shapes differ or T <= 0.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    check(student_logits, teacher_logits, T)
    student, teacher = student_logits.float() / T, teacher_logits.detach().float() / T
    return T**2 * divergence(student, teacher, T)


def kd_top_k(student_logits: Tensor, teacher: TopKLogits, *, T: float) -> Tensor:
    """Returns kd() between the teacher's k largest classes and one class for all the others together.

    In nats, mean over the images. It is never more than kd() of all logits, and equal to it where teacher and student
    divide the rest among the other classes alike. Raises ValueError for a T other than 1, 2, 3, 4.
    """
    rest = rest_at(teacher, T).unsqueeze(1)
    student = F.log_softmax(student_logits.float() / T, dim=1)
    others = torch.logsumexp(student.scatter(1, teacher.classes, -torch.inf), dim=1, keepdim=True)
    student = torch.cat([student.gather(1, teacher.classes), others], dim=1)
    target = F.log_softmax(torch.cat([teacher.values / T, rest], dim=1).detach(), dim=1)
    return T**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class KD(Method):
    """The KL term at temperature T. `w`, or both of `kd_weight` and `ce_weight`, weigh it against CE."""

    name: ClassVar[str] = "kd"
    formula: ClassVar[str] = "T^2 * KL(softmax(t/T) || softmax(s/T))"
    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    supports_top_k: ClassVar[bool] = True

    T: float = temperature_option(3.0, photos=1.0)
    w: float | None = option(
        0.8,
        "weight of the KD term; the CE term has 1 - w: 0 is CE, 1 the teacher alone",
        photos=0.5,
        least=0,
        most=1,
    )
    kd_weight: float | None = kd_weight_option(None)
    ce_weight: float | None = ce_weight_option(None)
    standardize: bool = standardize_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [value is not None for value in (self.w, self.kd_weight, self.ce_weight)]
        if given not in ([True, False, False], [False, True, True]):
            raise UserError("a kd loss has either w, or both kd_weight and ce_weight")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | TopKLogits, labels: Tensor) -> Tensor:
        """Returns the term on logits; see Method."""
        if isinstance(teacher_logits, TopKLogits):
            return kd_top_k(student_logits, teacher_logits, T=self.T)
        if self.standardize:
            student_logits, teacher_logits = standardize(student_logits), standardize(teacher_logits)
        return kd(student_logits, teacher_logits, T=self.T)

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of the term on logits and of the CE term."""
        return super().weights if self.w is None else (self.w, 1 - self.w)

    @property
    def weight_names(self) -> tuple[str, str]:
        """The weights as the formula names them."""
        return super().weight_names if self.w is None else ("w", "(1 - w)")

    def changed(self, given: Mapping[str, Any], photos: bool = False) -> KD:
        """Returns the method with the flags `given`; either of the weights takes the place of w, and the reverse."""
        weights = {"kd_weight", "ce_weight"} & given.keys()
        if weights and "w" in given:
            raise UserError("--w shares out the loss, --kd-weight and --ce-weight weigh it: give one or the other")
        if "w" in given:
            given = {"kd_weight": None, "ce_weight": None, **given}
        elif weights and self.w is not None:
            given = {"w": None, "kd_weight": 1.0, "ce_weight": 1.0, **given}
        return super().changed(given, photos)
