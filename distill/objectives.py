"""What one training step minimises. An objective returns the logits, the loss and its named parts, so that one loop
serves all of them."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from distill.kd_loss import TopKLogits, kd, kd_top_k
from distill.views import Batch


class Step(NamedTuple):
    """logits (B, C) of the student; `loss` to call backward() on; detached `parts` in the order of Objective.parts."""

    logits: Tensor
    loss: Tensor
    parts: tuple[Tensor, ...]


class Objective(Protocol):
    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""
        ...

    def __call__(self, student: nn.Module, batch: Batch) -> Step: ...


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """CE in nats, mean over the batch; of mixed images the CE of both labels, weighted by their shares u and 1 - u."""
    if batch.mixture is None:
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)
    share = batch.mixture.share
    own, other = (
        F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (batch.labels, batch.mixture.labels)
    )
    return (share * own + (1 - share) * other).mean()


@dataclass(frozen=True)
class CrossEntropy:
    """CE(s, y) in nats, mean over the batch; `label_smoothing` e mixes the label with the uniform distribution,
    (1 - e) * CE(s, y) + e * mean over classes of CE(s, class)."""

    label_smoothing: float = 0.0
    parts: tuple[str, ...] = ()

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        logits = student(batch.images)
        return Step(logits, cross_entropy(logits, batch, self.label_smoothing), ())


@dataclass(frozen=True)
class Distillation:
    """w * kd(s, t) + (1 - w) * CE(s, y), in nats, mean over the batch. Without labels, which takes w = 1: kd(s, t).

    The batch brings the teacher's logits along; where they come from is no business of this class.
    """

    temperature: float
    w: float
    label_smoothing: float = 0.0
    labelled: bool = True

    def __post_init__(self) -> None:
        if not self.labelled and self.w < 1:
            raise ValueError(f"images without labels are taught by the teacher alone, w = 1, not {self.w}")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("kd", "ce") if self.labelled else ("kd",)

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        assert batch.teacher_logits is not None
        logits = student(batch.images)
        loss = kd_top_k if isinstance(batch.teacher_logits, TopKLogits) else kd
        soft = loss(logits, batch.teacher_logits, temperature=self.temperature)
        if not self.labelled:
            return Step(logits, soft, (soft.detach(),))
        hard = cross_entropy(logits, batch, self.label_smoothing)
        return Step(logits, self.w * soft + (1 - self.w) * hard, (soft.detach(), hard.detach()))
