"""Knowledge review (Chen et al. 2021): a stage of the student, and those after it, learn one of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.feature_method import (
    FeatureContext,
    FeatureMethod,
    Shape,
    check_maps,
    feature_weight_option,
    pool_alike,
    pool_to,
)
from distill.options import option

if TYPE_CHECKING:
    from torch import nn

LEVELS = (4, 2, 1)  # sizes that maps are averaged to, beside their own
WIDEST = 512  # channels within the fusion, at most


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the weighted mean of the squared difference at several sizes, a scalar in float32.

    The weight is 1 at the maps' own size and halves at each of 4x4, 2x2, 1x1 that is smaller than that; the sum is
    divided by that of the weights. Shapes: (B, C, H, W) both. No gradient to the teacher. Raises ValueError.
    Source: Chen et al. 2021, arXiv:2104.09044.
    """
    check_maps(student, teacher, same=True)
    own, other = student.float(), teacher.detach().float()
    loss, weight, total = F.mse_loss(own, other), 1.0, 1.0
    for level in LEVELS:
        if level < own.shape[2]:
            size = (level, min(level, own.shape[3]))
            weight /= 2
            loss = loss + weight * F.mse_loss(pool_to(own, size), pool_to(other, size))
            total += weight
    return loss / total


@dataclass(frozen=True)
class ReviewKD(FeatureMethod):
    """Every stage, fused from the deepest to the first, by attention between a stage and what comes after it.

    The deepest level is what the last layer gets, (B, D), as a map of one pixel.
    """

    name: ClassVar[str] = "reviewkd"
    formula: ClassVar[str] = "sum over stages, and what the last layer gets, of hierarchical_context(fused(s), t)"
    source: ClassVar[str] = "Chen et al. 2021, arXiv:2104.09044"
    learns: ClassVar[str] = "fusion: three convolutions (of the deepest two) and two BatchNorms a level"
    before_activation: ClassVar[bool] = True
    with_pooled: ClassVar[bool] = True

    feature_weight: float = feature_weight_option(1.0)
    feature_warmup: float = option(
        20.0, "epochs over which the weight of the term rises, 1/N in the first", group="features", photos=1.0, least=0
    )

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> nn.Module:
        """Returns the fusion of each level; the deepest has none to be fused with."""
        width = min(WIDEST, student[-1][0])
        pairs = list(zip(student, teacher, strict=True))
        last = len(pairs) - 1
        parts = [_fusion(own[0], width, other[0], fused=k < last) for k, (own, other) in enumerate(pairs)]
        return torch.nn.ModuleList(parts)

    def connect(self, learned: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Returns the student's features as the teacher's are, in the order of the levels."""
        fused = [part.narrow(own) for part, own in zip(learned, map(_as_map, student), strict=True)]
        for stage in reversed(range(len(fused) - 1)):
            fused[stage] = _fuse(learned[stage].attention, fused[stage], fused[stage + 1])
        levels = pool_alike(fused, [_as_map(other) for other in teacher])
        return [part.widen(own) for part, own in zip(learned, levels, strict=True)]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the sum of hierarchical_context() over the levels."""
        pairs = zip(student, pool_alike([_as_map(other) for other in teacher], student), strict=True)
        return torch.stack([hierarchical_context(own, target) for own, target in pairs]).sum()


def _as_map(feature: Tensor) -> Tensor:
    return feature[:, :, None, None] if feature.dim() == 2 else feature


def _fusion(in_channels: int, width: int, out_channels: int, *, fused: bool) -> nn.Module:
    part = torch.nn.Module()
    first = torch.nn.Conv2d(in_channels, width, 1, bias=False)
    last = torch.nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
    for convolution in (first, last):
        torch.nn.init.kaiming_uniform_(convolution.weight, a=1)
    part.narrow = torch.nn.Sequential(first, torch.nn.BatchNorm2d(width))
    part.widen = torch.nn.Sequential(last, torch.nn.BatchNorm2d(out_channels))
    if fused:
        part.attention = torch.nn.Conv2d(2 * width, 2, 1)
    return part


def _fuse(attention: Any, own: Tensor, deeper: Tensor) -> Tensor:
    """Returns a stage with the fused one after it, (B, width, H, W), by a share of each at every pixel."""
    enlarged = F.interpolate(deeper, own.shape[2:], mode="nearest")
    shares = attention(torch.cat([own, enlarged], dim=1)).sigmoid()
    return own * shares[:, :1] + enlarged * shares[:, 1:]
