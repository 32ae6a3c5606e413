"""What a method of distillation is: a frozen dataclass whose fields are its flags, and which gives the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from distill.errors import UserError
from distill.lazy import Tensor
from distill.losses.top_k import TopKLogits
from distill.options import flag, option, validate

Self = TypeVar("Self", bound="Settings")
SelfMethod = TypeVar("SelfMethod", bound="Method")
STANDARDIZED_T = 2.0  # default temperature of standardised logits
STANDARDIZED_SOURCE = "s and t standardised, Sun et al. 2024, arXiv:2403.01427"


def temperature_option(default: float, photos: float) -> Any:
    """Returns the field `T` of a method."""
    words = "temperature; higher shows more of what the teacher thinks of the wrong classes"
    return option(default, words, photos=photos, aliases=("--tau",), least=1e-4, most=1e4)


def warmup_option(default: float = 0.0, photos: float | None = None) -> Any:
    """Returns the field `kd_warmup` of a method, in epochs."""
    words = "epochs over which the weight of the term on logits rises, 1/N in the first"
    return option(default, words, photos=photos, aliases=("--ramp",), least=0)


def kd_weight_option(default: float | None = 1.0) -> Any:
    """Returns the field `kd_weight` of a method."""
    return option(default, "weight of the term on logits", least=0)


def ce_weight_option(default: float | None = 1.0) -> Any:
    """Returns the field `ce_weight` of a method."""
    return option(default, "weight of the CE term", least=0)


def standardize_option() -> Any:
    """Returns the field `standardize` of a method that can take standardised logits (divergence.standardize)."""
    words = f"logits less their mean, over their deviation, image by image (default of --T then: {STANDARDIZED_T})"
    return option(False, words)


@dataclass(frozen=True)
class Settings:
    """Validated fields made with `option`, under a name. Raises UserError for a value out of range."""

    name: ClassVar[str]
    formula: ClassVar[str]  # of its term of the loss
    source: ClassVar[str]

    def __post_init__(self) -> None:
        validate(self)

    @classmethod
    def defaults(cls: type[Self], photos: bool = False) -> Self:
        """Returns the authors' values for small images, or for photos."""
        return cls(**{f.name: f.metadata["photos"] if photos else f.default for f in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Returns the name and the fields, as a record holds them."""
        return {"name": self.name, **asdict(self)}

    @property
    def numbers(self) -> dict[str, float]:
        """The flags in force that are numbers, by name."""
        return {k: v for k, v in asdict(self).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}

    @classmethod
    def flags(cls) -> str:
        """Returns its flags and their defaults (on photos), as --help and distill/README.md show them."""
        small, photos = cls.defaults().numbers, cls.defaults(photos=True).numbers
        other = {name: f" ({photos[name]:g})" if photos[name] != value else "" for name, value in small.items()}
        return ", ".join(f"{flag(name)} {value:g}{other[name]}" for name, value in small.items())


@dataclass(frozen=True)
class Method(Settings):
    """A loss on logits. A subclass defines `__call__`, fields, and the class variables that differ from these.

    `T`, `kd_weight`, `ce_weight`, `kd_warmup` and `standardize` are fields where a method has them.
    """

    note: ClassVar[str] = ""  # on what stands in the formula
    needs_labels: ClassVar[bool] = False  # one label for each image
    needs_teacher_logits: ClassVar[bool] = True
    supports_top_k: ClassVar[bool] = False  # it takes TopKLogits
    correlates_images: ClassVar[bool] = False  # the loss of an image depends on the others in the batch
    divides_by_deviation: ClassVar[bool] = False  # of the student's logits, as `standardize` does
    zero_at_equality: ClassVar[bool] = True  # else its least value depends on the teacher

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor | TopKLogits, labels: Tensor) -> Tensor:
        """Returns the term on logits, a scalar in nats, mean over the images.

        Shapes: logits (B, C), labels int64 (B,).
        """
        raise NotImplementedError

    @property
    def T(self) -> float:  # noqa: N802
        """The temperature; 1 without one."""
        return 1.0

    @property
    def kd_weight(self) -> float | None:
        """The weight of the term on logits."""
        return None

    @property
    def ce_weight(self) -> float | None:
        """The weight of the CE term."""
        return None

    @property
    def kd_warmup(self) -> float:
        """The epochs over which the weight of the term on logits rises; 0 is off."""
        return 0.0

    @property
    def standardize(self) -> bool:
        """Whether logits are standardised first."""
        return False

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of the term on logits and of the CE term."""
        return self.kd_weight or 0.0, self.ce_weight or 0.0

    @property
    def weight_names(self) -> tuple[str, str]:
        """The weights as the formula names them."""
        return "kd_weight", "ce_weight"

    @property
    def terms(self) -> list[str]:
        """The terms of the whole loss."""
        kd_weight, ce_weight = self.weight_names
        rising = "min(epoch / kd_warmup, 1) * " if self.kd_warmup else ""
        kd = [f"{kd_weight} * {rising}{self.formula}"] if self.needs_teacher_logits else []
        return [*kd, f"{ce_weight} * CE(s, y)"]

    def changed(self: SelfMethod, given: Mapping[str, Any], photos: bool = False) -> SelfMethod:
        """Returns the method with the flags `given`. Where --standardize goes on or off, T starts from its default.

        Raises UserError for a flag of another method.
        """
        names = [f.name for f in fields(self)]
        for name in given:
            if name not in names:
                takes = ", ".join(map(flag, names))
                raise UserError(f"{flag(name)} is no flag of --method {self.name}, which takes {takes}")
        standardize = given.get("standardize", self.standardize)
        if standardize != self.standardize:
            given = {"T": STANDARDIZED_T if standardize else self.defaults(photos).T, **given}
        return replace(self, **given)
