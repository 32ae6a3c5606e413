"""What one training step minimises. An objective returns the logits, the loss and its named parts, so that one loop
serves all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.data.datasets import Batch, TrainingData
from distill.errors import UserError
from distill.features.overhaul import Connected, FeatureLoss
from distill.losses import kd_loss
from distill.losses.kd_loss import TopKLogits, standardize
from distill.losses.methods import METHODS
from distill.models.classifier import Classifier
from distill.parallel.processes import world_size
from distill.teacher.teacher import Teacher
from distill.training.wrap import check_batch_norm


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

    @property
    def model(self) -> Connected | None:
        """What is trained in the student's place: the student and what learns beside it. None: the student alone."""
        ...

    def __call__(self, student: nn.Module, batch: Batch) -> Step: ...


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """CE in nats, mean over the batch; of mixed images the CE of both labels, weighted by u and 1 - u."""
    if batch.mixture is None:
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=label_smoothing)
    coefficient = batch.mixture.coefficient
    own, other = (
        F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (batch.labels, batch.mixture.labels)
    )
    return (coefficient * own + (1 - coefficient) * other).mean()


@dataclass(frozen=True)
class CrossEntropy:
    """CE(s, y) in nats, mean over the batch; `label_smoothing` e mixes the label with the uniform distribution,
    (1 - e) * CE(s, y) + e * mean over classes of CE(s, class).
    """

    label_smoothing: float = 0.0
    parts: tuple[str, ...] = ()
    model: None = None

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        return self.step(student(batch.images), batch)

    def step(self, logits: Tensor, batch: Batch) -> Step:
        return Step(logits, cross_entropy(logits, batch, self.label_smoothing), ())


LogitLoss = Callable[[Tensor, Any, Tensor], Tensor]
"""(student_logits (B, C), teacher_logits (B, C) or TopKLogits, labels (B,)) -> scalar."""


def logit_loss(recipe: Recipe) -> LogitLoss:
    """The function of kd_loss.py that `recipe.method` names, with the recipe's values for its keywords."""
    method = recipe.method or "kd"
    function = getattr(kd_loss, method)
    keywords = {
        ("temperature" if name == "T" or (name == "tau" and "tau" not in signature(function).parameters) else name): v
        for name, v in recipe.settings.items()
        if name not in ("w", "ramp", "kd_weight", "ce_weight")
    }

    def loss(student: Tensor, teacher: Any, labels: Tensor) -> Tensor:
        named = (labels,) if METHODS[method].labels else ()
        found: Tensor
        if isinstance(teacher, TopKLogits):
            found = getattr(kd_loss, f"{method}_top_k")(student, teacher, *named, **keywords)
            return found
        if recipe.standardize:
            student, teacher = standardize(student), standardize(teacher)
        found = function(student, teacher, *named, **keywords)
        return found

    return loss


@dataclass(frozen=True)
class Distillation:
    """kd_weight * min((epoch + 1) / ramp, 1) * loss(s, t, y) + ce_weight * CE(s, y), mean over the batch; `ramp` in
    epochs. Without labels, which takes ce_weight = 0, the first term alone.

    The batch brings the teacher's logits along; where they come from is no business of this class.
    """

    loss: LogitLoss
    kd_weight: float
    ce_weight: float
    ramp: float = 0.0
    label_smoothing: float = 0.0
    labelled: bool = True
    model: None = None

    def __post_init__(self) -> None:
        if not self.labelled and self.ce_weight:
            raise ValueError(f"images without labels are taught by the teacher alone, w = 1, not {self.kd_weight:g}")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("kd", "ce") if self.labelled else ("kd",)

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        return self.step(student(batch.images), batch)

    def step(self, logits: Tensor, batch: Batch) -> Step:
        assert batch.teacher_logits is not None
        soft = self.loss(logits, batch.teacher_logits, batch.labels)
        weight = self.kd_weight * min((batch.epoch + 1) / self.ramp, 1.0) if self.ramp else self.kd_weight
        if not self.labelled:
            return Step(logits, weight * soft, (soft.detach(),))
        hard = cross_entropy(logits, batch, self.label_smoothing)
        return Step(logits, weight * soft + self.ce_weight * hard, (soft.detach(), hard.detach()))


@dataclass(frozen=True)
class Overhaul:
    """weight * features(student, teacher) + ce_weight * CE(s, y), or in place of CE what `logits` minimises.

    The student that it is called with is that of features.learner, which returns its features too.
    """

    features: FeatureLoss
    weight: float
    logits: CrossEntropy | Distillation
    ce_weight: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        return ("features", *(self.logits.parts or ("ce",)))

    @property
    def model(self) -> Connected:
        return self.features.learner

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        logits, found = student(batch.images)
        features = self.features(found, batch.images)
        step = self.logits.step(logits, batch)
        alone = isinstance(self.logits, CrossEntropy)
        rest = self.ce_weight * step.loss if alone else step.loss
        parts = (features.detach(), *((step.loss.detach(),) if alone else step.parts))
        return Step(logits, self.weight * features + rest, parts)


def objective(
    recipe: Recipe,
    student: Classifier,
    teacher: Teacher,
    data: TrainingData,
    device_name: str = "cpu",
) -> Distillation | Overhaul:
    """What `recipe` minimises with `teacher`; printed with the values in force. data: where a margin is to be measured.
    Raises UserError.
    """
    print(recipe.formula)
    if recipe.standardize or METHODS[recipe.method or "kd"].by_deviation:
        start_last_layer(student, recipe)
    if not recipe.overhaul:
        return distillation(recipe, data.labelled)
    names = (recipe.arch, recipe.teacher_arch or "the teacher")
    given: dict[str, Any] = {"seed": recipe.seed, "teacher_bn": recipe.teacher_bn, "device_name": device_name}
    features = FeatureLoss(student, teacher, names, **given)
    if recipe.teacher_bn == "batch":
        check_batch_norm(teacher.network, names[1], recipe, device_name, features.known_features)
    features.measure(data.batches(0))
    print(features)
    alone = recipe.method == "none"
    logits = CrossEntropy(recipe.label_smoothing) if alone else distillation(recipe, data.labelled)
    return Overhaul(features, recipe.feature_weight or 0.0, logits, recipe.ce_weight or 0.0)


@torch.no_grad()
def start_last_layer(student: Classifier, recipe: Recipe) -> None:
    """Give a last layer of zeros, or of weights a hundredth of the usual, those that torch's layers start from, uniform
    in +-1 / sqrt(inputs), drawn from the recipe's seed; it says so. Logits that are all alike have no deviation, and a
    loss that divides by it a gradient of millions, which ends the run in its first steps.
    """
    layers = [(k, m) for k, m in student.network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name, layer in layers:
        weight, bound = layer.weight, layer.weight[0].numel() ** -0.5
        if len(weight) != len(layers[-1][1].weight) or weight.square().mean().sqrt() > 0.01 * bound:
            continue
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(recipe.seed))
        weight.copy_(bound * (2 * drawn - 1))
        what = "--standardize" if recipe.standardize else f"--method {recipe.method}"
        print(f"note: {name} of {recipe.arch} starts from small random weights, not from zeros: {what} wants it")


def distillation(recipe: Recipe, labelled: bool = True) -> Distillation:
    """What `recipe` minimises on logits. Raises ValueError, and UserError where a process has too few images."""
    if recipe.method == "dist" and recipe.batch_size < 2 * recipe.accumulate * world_size():
        raise UserError(
            f"--method dist correlates across the images of a process: --batch-size {recipe.batch_size} is too small "
            f"for {world_size()} of them"
        )
    return Distillation(logit_loss(recipe), *recipe.shares, recipe.ramp or 0.0, recipe.label_smoothing, labelled)


build_loss = objective
