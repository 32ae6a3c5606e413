"""The student with what learns beside it for a loss on features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.features.points import FeatureExtractor, FeaturePoint
from distill.losses.feature_method import FeatureMethod
from distill.models.classifier import Classifier


class Connected(nn.Module):
    """The student and the parts of a method that learn: images, teacher's features -> (logits, what the loss takes).

    `connectors`, None where nothing learns beside the student, are trained with it and are no part of what is exported.
    """

    def __init__(
        self,
        student: Classifier,
        points: Sequence[FeaturePoint],
        targets: Sequence[FeaturePoint],
        method: FeatureMethod,
        seed: int,
    ) -> None:
        super().__init__()
        self.method = method
        self.extractor = FeatureExtractor(student, points, after=not method.before_activation)
        self.target_shapes = [point.shape for point in targets]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.connectors = method.build([point.shape for point in points], self.target_shapes)
        if self.connectors is not None:
            self.connectors.to(student.mean.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, targets: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns the logits, and what the loss compares with the teacher's features.

        targets: these features, which a part may want; without them zeros, for a step on trial.
        """
        logits, features = self.extractor(images)
        if targets is None:
            targets = [torch.zeros(len(images), *shape, device=images.device) for shape in self.target_shapes]
        precision = self.extractor.classifier.precision
        with torch.autocast(images.device.type, dtype=precision, enabled=precision != torch.float32):
            return logits, self.method.connect(self.connectors, features, targets)
