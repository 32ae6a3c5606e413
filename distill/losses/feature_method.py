"""What a method on features is: a frozen dataclass whose fields are its flags, and which gives the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from distill.lazy import F, Tensor, torch
from distill.losses.method import Settings
from distill.options import option

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]


def feature_weight_option(default: float, photos: float | None = None) -> Any:
    """Returns the field `feature_weight` of a method on features."""
    return option(default, "weight of the term on features", photos=photos, group="features", least=0)


@dataclass(frozen=True)
class FeatureContext:
    """What a term on features may know beside the features.

    margins: (C_i,) for each stage, of `overhaul` alone. scores, count: of `crd` alone, from its memories: (B, 1 + K) of
    student and teacher, and the number of images that the K others are drawn from.
    """

    margins: Sequence[Tensor] = ()
    scores: tuple[Tensor, Tensor] | None = None
    count: int = 0


@dataclass(frozen=True)
class FeatureMethod(Settings):
    """A loss on features. A subclass defines `__call__`, fields, and the class variables that differ from these.

    Features are those of the ends of the stages, (B, C_i, H_i, W_i), aligned at the last one, or with `pooled` one
    vector an image, (B, D): what the last layer gets. `with_pooled`: that vector as well, as the last stage.
    """

    learns: ClassVar[str] = ""  # what learns beside the student, for the table of methods
    pooled: ClassVar[bool] = False
    with_pooled: ClassVar[bool] = False
    before_activation: ClassVar[bool] = False
    correlates_images: ClassVar[bool] = False  # the loss of an image depends on the others in the batch
    needs_labels: ClassVar[bool] = False  # one label for each image
    remembers_images: ClassVar[bool] = False  # has a memory of the training images

    def choose(self, stages: int) -> Sequence[int]:
        """Returns which of the aligned stages are compared, all of them unless a method says otherwise."""
        return range(stages)

    def build(self, student: Sequence[Shape], teacher: Sequence[Shape]) -> nn.Module | None:
        """Returns what learns beside the student, for features of these shapes without B; None for nothing."""
        return None

    def connect(self, learned: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Returns what goes through `learned`, the result of build(); each tensor begins with B."""
        return list(student)

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: FeatureContext) -> Tensor:
        """Returns the term on features, a scalar. student: the result of connect(); teacher: raw."""
        raise NotImplementedError

    @property
    def term(self) -> str:
        """The formula, in brackets where it is a sum, to stand behind its weight."""
        return f"({self.formula})" if " + " in self.formula else self.formula

    @property
    def feature_weight(self) -> float:
        """The weight of the term."""
        return 1.0

    @property
    def teacher_bn(self) -> str:
        """The statistics that the teacher's BatchNorm uses for features: `eval`, its own, or `batch`."""
        return "eval"

    @property
    def feature_warmup(self) -> float:
        """The epochs over which that weight rises; 0 is off."""
        return 0.0


def check_maps(student: Tensor, teacher: Tensor, *, same: bool = False) -> None:
    """Raises ValueError unless both are maps (B, C, H, W) of one batch; same: of one shape."""
    fits = student.dim() == 4 and teacher.dim() == 4 and len(student) == len(teacher) and len(student) > 0
    if not fits or (same and student.shape != teacher.shape):
        wanted = "of one shape (B, C, H, W)" if same else "(B, C, H, W) of one batch"
        raise ValueError(f"features must be {wanted}, got {tuple(student.shape)}, {tuple(teacher.shape)}")


def check_vectors(student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both are (B, D) of one batch of two images at least."""
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) < 2:
        shapes = f"{tuple(student.shape)}, {tuple(teacher.shape)}"
        raise ValueError(f"pooled features must be (B, D) of one batch of two images at least, got {shapes}")


def pool_to(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns (B, C, H, W) averaged to `size` where it is larger."""
    height, width = feature.shape[2:]
    if height % size[0] or width % size[1]:
        return F.adaptive_avg_pool2d(feature, size)
    window = (height // size[0], width // size[1])
    # has a gradient with --deterministic on CUDA too
    return feature if window == (1, 1) else F.avg_pool2d(feature, window)


def pool_alike(features: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Returns each of `features`, averaged to the size of the other map beside it where that is smaller."""
    pairs = zip(features, others, strict=True)
    return [
        pool_to(own, (min(own.shape[2], other.shape[2]), min(own.shape[3], other.shape[3]))) for own, other in pairs
    ]


def pool_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both maps in float32, the larger one averaged to the size of the other; the teacher's detached."""
    own, other = student.float(), teacher.detach().float()
    return pool_alike([own], [other])[0], pool_alike([other], [own])[0]


def connector(in_channels: int, out_channels: int) -> nn.Module:
    """Returns a 1x1 convolution without bias and a BatchNorm."""
    convolution = torch.nn.Conv2d(in_channels, out_channels, 1, bias=False)
    torch.nn.init.normal_(convolution.weight, 0, (2 / out_channels) ** 0.5)
    return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(out_channels))
