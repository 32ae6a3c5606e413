"""Contrastive representation distillation (Tian et al. 2020): an image's two embeddings find each other among many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import FeatureContext, FeatureMethod, Shape, feature_weight_option
from distill.options import option

if TYPE_CHECKING:
    from torch import nn

EPSILON = 1e-7  # its authors', under the logarithm


def contrast(scores: Tensor, count: int) -> Tensor:
    """Returns -(log h(score_0) + sum over the K others of log(1 - h(score_k))), mean over images, in float32.

    h(p) = p / (p + K / count): whether a pair is of one image, against K pairs drawn from `count` images. scores:
    (B, 1 + K), positive, that of the image itself first. Raises ValueError. Source: Tian et al. 2020, arXiv:1910.10699.
    """
    if scores.dim() != 2 or scores.shape[1] < 2 or count < 2:
        raise ValueError(f"scores must be (B, 1 + K) with K of 1 at least, got {tuple(scores.shape)} of {count} images")
    noise = (scores.shape[1] - 1) / count
    scores = scores.float()
    total = scores + noise + EPSILON
    right = torch.log(scores[:, 0] / total[:, 0])
    wrong = torch.log(noise / total[:, 1:]).sum(1)
    return -(right + wrong).mean()


@dataclass(frozen=True)
class CRD(FeatureMethod):
    """What the last layers get, embedded, against memories of the whole training set (distill/features/memory.py)."""

    name: ClassVar[str] = "crd"
    formula: ClassVar[str] = "contrast(s, memory of t) + contrast(t, memory of s)"
    source: ClassVar[str] = "Tian et al. 2020, arXiv:1910.10699"
    learns: ClassVar[str] = "a linear embedding of each network; two memories of N x embedding that follow it"
    pooled: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    remembers_images: ClassVar[bool] = True

    feature_weight: float = feature_weight_option(0.8)
    embedding: int = option(128, "dimensions in which the two networks are compared", group="features", least=2)
    negatives: int = option(16384, "images of other classes that an image is told from", group="features", least=1)
    contrast_temperature: float = option(0.07, "temperature of the contrast", group="features", above=0)
    contrast_momentum: float = option(0.5, "of the memories", group="features", least=0, below=1)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> nn.Module:
        """Returns the two embeddings."""
        sizes = (student[0][0], teacher[0][0])
        return torch.nn.ModuleList(torch.nn.Linear(size, self.embedding) for size in sizes)

    def connect(self, learned: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Returns the embeddings (B, embedding) of student and teacher, of length 1."""
        pairs = zip(learned, (student[0], teacher[0]), strict=True)
        return [F.normalize(part(vectors.float()).float(), dim=1) for part, vectors in pairs]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the sum of contrast() from both sides."""
        assert context.scores
        return torch.stack([contrast(scores, context.count) for scores in context.scores]).sum()
