"""A loss on features, with what it takes: points of both networks, margins, memories, the teacher's forward pass."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distill.data.datasets import Batch, TrainingData
from distill.features.connected import Connected
from distill.features.memory import ContrastMemory, Negatives
from distill.features.points import FeatureExtractor, FeaturePoint, find_embedding_point, find_feature_points
from distill.losses.crd import CRD
from distill.losses.feature_method import FeatureContext, FeatureMethod
from distill.losses.overhaul import Overhaul, margin
from distill.models.classifier import Classifier
from distill.parallel.devices import wrap_inference
from distill.parallel.processes import reduce, world_size
from distill.teacher.teacher import Teacher

MEASURED = 10_000  # images


def find_points(classifier: Classifier, name: str, method: FeatureMethod) -> tuple[FeaturePoint, ...]:
    """Returns where `method` takes the features of a network. Raises UserError where there are no such places."""
    stages = () if method.pooled else find_feature_points(classifier, name)
    return (*stages, find_embedding_point(classifier, name)) if method.pooled or method.with_pooled else stages


class FeatureLoss:
    """The loss `method` on features, and what it takes.

    That is the points of both networks, aligned at the end, and `model`, the student with what learns beside it, which
    is trained; of overhaul the teacher's margins, of crd its `memory`. method.teacher_bn: `batch` lets the teacher's
    BatchNorm use the statistics of the batch; its running ones do not move. Raises UserError where a network's stages
    cannot be found.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Teacher,
        names: tuple[str, str],
        method: FeatureMethod = Overhaul(),  # noqa: B008 it is frozen
        *,
        seed: int = 0,
        device_name: str = "cpu",
        data: TrainingData | None = None,
    ) -> None:
        """data: what is trained on, which a method with a memory needs."""
        student_points = find_points(student, names[0], method)
        teacher_points = find_points(teacher.network, names[1], method)
        count = min(len(student_points), len(teacher_points))
        pairs = list(zip(student_points[-count:], teacher_points[-count:], strict=True))
        chosen = [pairs[k] for k in (range(count) if method.pooled else method.choose(count))]
        self.method = method
        self.student_points, self.teacher_points = [own for own, _ in chosen], [other for _, other in chosen]
        self.model = Connected(student, self.student_points, self.teacher_points, method, seed)
        norms = [module for module in teacher.network.modules() if isinstance(module, _BatchNorm)]
        self._norms = norms if method.teacher_bn == "batch" else []
        extractor = FeatureExtractor(teacher.network, self.teacher_points, after=not method.before_activation)
        self._device = teacher.network.mean.device
        self._teacher = wrap_inference(extractor, self._device, device_name)
        self.margins: list[Tensor | None] = []
        if isinstance(method, Overhaul):
            known = [(p.scale, p.shift) for p in self.teacher_points]
            self.margins = [None if a is None or b is None else margin(a, b) for a, b in known]
        self.memory: ContrastMemory | None = None
        if isinstance(method, CRD) and data is not None:
            self._remember(method, data, seed)

    def _remember(self, method: CRD, data: TrainingData, seed: int) -> None:
        """Makes the memories of all training images, after it has said how large they are."""
        count, size = data.image_count, method.embedding
        print(f"features: two memories of {count:,} images x {size} take {2 * 4 * count * size / 1e6:,.1f} MB")
        self._negatives = Negatives(data.labels, data.plan.indices, method.negatives, seed)
        self._count = len(data.plan.indices)
        memory = ContrastMemory(count, size, method.contrast_temperature, method.contrast_momentum, seed)
        self.memory = memory.to(self._device)

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> list[Tensor]:
        """Those of the teacher, raw."""
        for module in self._norms:  # statistics of the batch, the running ones neither used nor moved
            module.training, module.track_running_stats = True, False
        try:
            features: list[Tensor] = self._teacher(images)[1]
        finally:
            for module in self._norms:
                module.training, module.track_running_stats = False, True
        return features

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> None:
        """Measures the margin where the teacher has no BatchNorm at a feature point.

        It is the mean of a channel's negative values over `batches`, as far as MEASURED images.
        """
        missing = [k for k, margin in enumerate(self.margins) if margin is None]
        if not missing:
            return
        print(f"features: measuring the teacher's margins on up to {MEASURED:,} training images")
        seen = 0
        sums = [torch.zeros(2, self.teacher_points[k].shape[0], dtype=torch.float64) for k in missing]
        for batch in batches:
            features = self.teacher_features(batch.images)
            seen += len(batch.images) * world_size()
            for total, k in zip(sums, missing, strict=True):
                negative = features[k].double().clamp(max=0)
                total += torch.stack([negative.sum((0, 2, 3)), (negative < 0).sum((0, 2, 3))]).cpu()
            if seen >= MEASURED:
                break
        for total, k in zip(sums, missing, strict=True):
            reduce(total)
            self.margins[k] = (total[0] / total[1].clamp(min=1)).float().to(self._device)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """Returns the loss, a scalar.

        student: what `model` returns beside the logits; teacher: teacher_features() of the same images.
        """
        context = FeatureContext([limit for limit in self.margins if limit is not None])
        if self.memory is not None:
            scores = self.memory.scores(student[0], student[1], batch.indices, self._negatives.of(batch), self._count)
            self.memory.update(student[0], student[1], batch.indices)
            context = FeatureContext(scores=scores, count=self._count)
        return self.method(student, teacher, context)

    def __str__(self) -> str:
        kind = "before the last activation of a stage" if self.method.before_activation else "of the ends of stages"
        kind = "that the last layer gets" if self.method.pooled else f"(channels, height, width), {kind}"
        lines = [f"features {kind}{'' if self.method.pooled else ' or after a linear block'}:"]
        for number, (student, teacher) in enumerate(zip(self.student_points, self.teacher_points, strict=True)):
            line = f"  student {student.where} {student.shape}  teacher {teacher.where} {teacher.shape}"
            lines.append(line + (f"  margin {self._margin(number)}" if self.margins else ""))
        return "\n".join(lines)

    def _margin(self, stage: int) -> str:
        limit = self.margins[stage]
        return "measured on training images" if limit is None else f"{limit.min():.3f} to {limit.max():.3f}"
