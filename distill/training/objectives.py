"""What one training step minimises.

An objective returns the logits, the loss and its named parts, so that one loop serves all of them.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config.recipe import Recipe
from distill.data.datasets import Batch, TestData, TrainingData, spread
from distill.errors import UserError
from distill.features.connected import Connected
from distill.features.loss import FeatureLoss
from distill.losses.method import Method
from distill.losses.top_k import top_k_error
from distill.models.classifier import Classifier
from distill.parallel.processes import world_size
from distill.teacher.report import COMPARED, TeacherReport
from distill.teacher.teacher import Teacher
from distill.training.wrap import check_batch_norm


class Step(NamedTuple):
    """What a loss returns: the student's logits (B, C), the loss to call backward() on, and its parts.

    The parts are detached, in the order of Objective.parts.
    """

    logits: Tensor
    loss: Tensor
    parts: tuple[Tensor, ...]


class Objective(Protocol):
    """What the training loop calls for each batch."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""
        ...

    @property
    def model(self) -> Connected | None:
        """What is trained in the student's place: the student and what learns beside it. None: the student alone."""
        ...

    @property
    def memory(self) -> nn.Module | None:
        """What the loss remembers from step to step, as state of the run; None: nothing."""
        ...

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        """Returns the loss of a batch."""
        ...


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Returns CE in nats, mean over the batch; of mixed images the CE of both labels, weighted by u and 1 - u."""
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
    """CE(s, y) in nats, mean over the batch.

    `label_smoothing` e mixes the label with the uniform distribution: (1 - e) * CE(s, y) + e * mean over classes of
    CE(s, class).
    """

    label_smoothing: float = 0.0
    parts: tuple[str, ...] = ()
    model: None = None
    memory: None = None

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        """Returns the loss of a batch."""
        return self.step(student(batch.images), batch)

    def step(self, logits: Tensor, batch: Batch) -> Step:
        """Returns the loss of the student's logits (B, C)."""
        return Step(logits, cross_entropy(logits, batch, self.label_smoothing), ())


@dataclass(frozen=True)
class Distillation:
    """kd_weight * min((epoch + 1) / kd_warmup, 1) * method(s, t, y) + ce_weight * CE(s, y), mean over the batch.

    `kd_warmup` is in epochs. Without labels, which takes ce_weight = 0, it is the first term alone. The batch brings
    the teacher's logits along.
    """

    method: Method
    label_smoothing: float = 0.0
    labelled: bool = True
    model: None = None
    memory: None = None

    def __post_init__(self) -> None:
        if not self.labelled and self.method.weights[1]:
            ce_weight = self.method.weights[1]
            raise ValueError(f"images without labels have no CE term: w = 1 or ce_weight = 0, not {ce_weight:g} for it")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of the loss."""
        return ("kd", "ce") if self.labelled else ("kd",)

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        """Returns the loss of a batch."""
        return self.step(student(batch.images), batch)

    def step(self, logits: Tensor, batch: Batch) -> Step:
        """Returns the loss of the student's logits (B, C)."""
        assert batch.teacher_logits is not None
        kd = self.method(logits, batch.teacher_logits, batch.labels)
        kd_weight, ce_weight = self.method.weights
        if self.method.kd_warmup:
            kd_weight *= min((batch.epoch + 1) / self.method.kd_warmup, 1.0)
        if not self.labelled:
            return Step(logits, kd_weight * kd, (kd.detach(),))
        ce = cross_entropy(logits, batch, self.label_smoothing)
        return Step(logits, kd_weight * kd + ce_weight * ce, (kd.detach(), ce.detach()))


@dataclass(frozen=True)
class FeatureDistillation:
    """feature_weight * features(student, teacher) + ce_weight * CE(s, y), or in place of CE what `logits` minimises.

    The student that it is called with is that of features.model, which returns its features too.
    """

    features: FeatureLoss
    logits: CrossEntropy | Distillation
    ce_weight: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of the loss."""
        return ("features", *(self.logits.parts or ("ce",)))

    @property
    def model(self) -> Connected:
        """The student and its connectors, which are trained."""
        return self.features.model

    @property
    def memory(self) -> nn.Module | None:
        """The memories of a contrast."""
        return self.features.memory

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        """Returns the loss of a batch."""
        targets, method = self.features.teacher_features(batch.images), self.features.method
        logits, student_features = student(batch.images, targets)
        features = self.features(student_features, targets, batch)
        weight = method.feature_weight
        if method.feature_warmup:
            weight *= min((batch.epoch + 1) / method.feature_warmup, 1.0)
        step = self.logits.step(logits, batch)
        alone = isinstance(self.logits, CrossEntropy)
        rest = self.ce_weight * step.loss if alone else step.loss
        parts = (features.detach(), *((step.loss.detach(),) if alone else step.parts))
        return Step(logits, weight * features + rest, parts)


def build_loss(
    recipe: Recipe,
    student: Classifier,
    teacher: Teacher,
    data: TrainingData,
    device_name: str = "cpu",
) -> Distillation | FeatureDistillation:
    """Returns what `recipe` minimises with `teacher`, and prints it with the values in force.

    data: where a margin is to be measured. Raises UserError.
    """
    print(recipe.formula)
    method = recipe.method
    assert method
    if method.standardize or method.divides_by_deviation:
        start_last_layer(student, recipe.arch, method, recipe.seed)
    check_loss(recipe, data.labelled)
    if not recipe.features:
        return distillation(recipe, data.labelled)
    names = (recipe.arch, recipe.teacher_arch or "the teacher")
    features = FeatureLoss(
        student, teacher, names, recipe.features, seed=recipe.seed, device_name=device_name, data=data
    )
    if recipe.features.teacher_bn == "batch":
        check_batch_norm(teacher.network, names[1], recipe, device_name, features.teacher_features)
    features.measure(data.batches(0))
    print(features)
    if method.needs_teacher_logits:
        return FeatureDistillation(features, distillation(recipe, data.labelled))
    return FeatureDistillation(features, CrossEntropy(recipe.label_smoothing), method.weights[1])


@torch.no_grad()
def start_last_layer(student: Classifier, arch: str, method: Method, seed: int) -> None:
    """Gives a last layer of zeros, or of weights a hundredth of the usual, small random ones, and says so.

    They are those that torch's layers start from, uniform in +-1 / sqrt(inputs), drawn from `seed`. Logits that are all
    alike have no deviation, and a loss that divides by it has a gradient of millions, which ends the run in its first
    steps.
    """
    layers = [(k, m) for k, m in student.network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name, layer in layers:
        weight, bound = layer.weight, layer.weight[0].numel() ** -0.5
        if len(weight) != len(layers[-1][1].weight) or weight.square().mean().sqrt() > 0.01 * bound:
            continue
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.copy_(bound * (2 * drawn - 1))
        what = "--standardize" if method.standardize else f"--method {method.name}"
        print(f"note: {name} of {arch} starts from small random weights, not from zeros: {what} wants it")


def distillation(recipe: Recipe, labelled: bool = True) -> Distillation:
    """Returns what `recipe` minimises on logits. Raises ValueError."""
    method = recipe.method
    assert method
    return Distillation(method, recipe.label_smoothing, labelled)


def check_loss(recipe: Recipe, labelled: bool) -> None:
    """Raises UserError where the methods of `recipe` cannot take the data, or a process's share of a batch."""
    method, features = recipe.method, recipe.features
    if method and method.correlates_images:
        _check_share(recipe, f"--method {method.name}")
    if features and features.correlates_images:
        _check_share(recipe, f"--features {features.name}")
    if features and features.needs_labels and not labelled:
        raise UserError(f"the training images have no labels, which --features {features.name} wants")


def _check_share(recipe: Recipe, what: str) -> None:
    if recipe.batch_size < 2 * recipe.accumulate * world_size():
        raise UserError(
            f"{what} correlates across the images of a process: --batch-size {recipe.batch_size} is too small for "
            f"{world_size()} of them"
        )


@torch.no_grad()
def measure_top_k(recipe: Recipe, student: Classifier, test: TestData, report: TeacherReport) -> float | None:
    """Returns and prints |g_k - g| / |g| of the gradient of the term on logits, on test images before training.

    None without --top-k.
    """
    if not recipe.top_k or not recipe.method:
        return None
    student.eval()
    some = spread(test, COMPARED)
    rows = [(student(images).cpu(), report.logits[places], labels.cpu()) for places, images, labels in some]
    logits, answers, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    with torch.enable_grad():
        error = top_k_error(recipe.method, logits, answers, labels, recipe.top_k)
    print(
        f"top-k: with {recipe.top_k} logits of an answer the gradient of the term on logits differs by "
        f"{100 * error:.2g} % from that with all, on {len(logits)} test images, the student as before training"
    )
    return error
