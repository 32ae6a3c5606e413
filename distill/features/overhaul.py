"""Features of student and teacher, connected, for the loss of distill/losses/overhaul.py."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.data.datasets import Batch
from distill.features.points import FeatureExtractor, FeaturePoint, find_feature_points
from distill.losses.overhaul import Overhaul, margin
from distill.models.classifier import Classifier
from distill.parallel.devices import wrap_inference
from distill.parallel.processes import reduce, world_size
from distill.teacher.teacher import Teacher

MEASURED = 10_000  # images


class Connected(nn.Module):
    """The student and a connector for each pair of points: uint8 images -> (logits, [features as the teacher's are]).

    A connector is a 1x1 convolution without bias and a BatchNorm. Where the student's map is larger than the teacher's
    it is average-pooled first. `connectors` learn with the student and are no part of what is exported.
    """

    def __init__(
        self, student: Classifier, points: Sequence[FeaturePoint], targets: Sequence[FeaturePoint], seed: int
    ) -> None:
        super().__init__()
        self.tapped = FeatureExtractor(student, points)
        self.sizes = [_smaller(own, other) for own, other in zip(points, targets, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pairs = zip(points, targets, strict=True)
            self.connectors = nn.ModuleList(_connector(own.shape[0], other.shape[0]) for own, other in pairs)
        self.connectors.to(student.mean.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the logits, and the features as the teacher has them."""
        logits, features = self.tapped(images)
        precision = self.tapped.classifier.precision
        with torch.autocast(images.device.type, dtype=precision, enabled=precision != torch.float32):
            pairs = zip(self.connectors, features, self.sizes, strict=True)
            return logits, [connector(pooled(feature, size)) for connector, feature, size in pairs]


def _connector(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.normal_(convolution.weight, 0, math.sqrt(2 / out_channels))
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _smaller(own: FeaturePoint, other: FeaturePoint) -> tuple[int, int]:
    return min(own.shape[1], other.shape[1]), min(own.shape[2], other.shape[2])


def pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W), averaged to `size` where it is larger."""
    height, width = feature.shape[2:]
    if height % size[0] or width % size[1]:
        return F.adaptive_avg_pool2d(feature, size)
    window = (height // size[0], width // size[1])
    # has a gradient with --deterministic on CUDA too
    return feature if window == (1, 1) else F.avg_pool2d(feature, window)


class FeatureLoss:
    """The loss `method` on features, and what it takes.

    That is the points of both networks, aligned at the end, the teacher's margins, and `model`, the student with its
    connectors, which is trained. method.teacher_bn: `batch` lets the teacher's BatchNorm use the statistics of the
    batch; its running ones do not move. Raises UserError where a network's stages cannot be found.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Teacher,
        names: tuple[str, str],
        method: Overhaul = Overhaul(),  # noqa: B008 it is frozen
        *,
        seed: int = 0,
        device_name: str = "cpu",
    ) -> None:
        student_points = find_feature_points(student, names[0])
        teacher_points = find_feature_points(teacher.network, names[1])
        count = min(len(student_points), len(teacher_points))
        self.method = method
        self.student_points, self.teacher_points = student_points[-count:], teacher_points[-count:]
        self.model = Connected(student, self.student_points, self.teacher_points, seed)
        norms = [module for module in teacher.network.modules() if isinstance(module, _BatchNorm)]
        self._norms = norms if method.teacher_bn == "batch" else []
        tapped = FeatureExtractor(teacher.network, self.teacher_points)
        self._device = teacher.network.mean.device
        self._teacher = wrap_inference(tapped, self._device, device_name)
        self.margins = [
            margin(p.scale, p.shift) if p.scale is not None and p.shift is not None else None
            for p in self.teacher_points
        ]

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

    def __call__(self, features: Sequence[Tensor], images: Tensor) -> Tensor:
        """Returns the loss, a scalar.

        features: the student's, connected; images: uint8 (B, H, W, 3), the same that it has seen.
        """
        targets = [
            pooled(target, (own.shape[2], own.shape[3]))
            for own, target in zip(features, self.teacher_features(images), strict=True)
        ]
        margins = [limit for limit in self.margins if limit is not None]
        return self.method(features, targets, margins)

    def __str__(self) -> str:
        lines = ["features (channels, height, width), before the last activation of a stage or after a linear block:"]
        for student, teacher, margins in zip(self.student_points, self.teacher_points, self.margins, strict=True):
            measured = (
                f"{margins.min():.3f} to {margins.max():.3f}" if margins is not None else "measured on training images"
            )
            lines.append(
                f"  student {student.where} {student.shape}  teacher {teacher.where} {teacher.shape}  margin {measured}"
            )
        return "\n".join(lines)
