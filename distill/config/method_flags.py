"""Which method the flags ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from distill.errors import UserError
from distill.losses import METHODS
from distill.losses.method import Method
from distill.losses.overhaul import Overhaul
from distill.options import flag, option, validate

FEATURE_FLAGS = tuple(f.name for f in fields(Overhaul))
METHOD_FLAGS = tuple(dict.fromkeys(f.name for method in METHODS.values() for f in fields(method)))


@dataclass(frozen=True)
class Choice:
    """The flags that choose the method; each method's own are its fields."""

    method: str | None = option(
        None,
        "loss on logits; --method NAME --help shows its flags; none is for --overhaul",
        choices=tuple(METHODS),
    )
    overhaul: bool = option(
        False, "learn the teacher's features as well; without a method given, in place of its logits"
    )

    def __post_init__(self) -> None:
        validate(self)


def choose_method(
    method: Method, features: Overhaul | None, given: Mapping[str, Any], photos: bool
) -> tuple[Method, Overhaul | None]:
    """Returns the method and the features that the flags `given` ask for, by name, beside those of a recipe.

    --method: another one starts from its own defaults. --overhaul: by itself it takes the place of the logits, with T,
    w or kd_weight it stands beside kd. Raises UserError for a flag that the method does not take.
    """
    choice = Choice(given.get("method"), given.get("overhaul", features is not None))
    name = choice.method or _implied(method.name, choice.overhaul, features is not None, given)
    own = {key: value for key, value in given.items() if key not in ("method", "overhaul", *FEATURE_FLAGS)}
    start = method if name == method.name else METHODS[name].defaults(photos)
    return start.changed(own, photos), _choose_features(features, choice.overhaul, given, photos)


def _implied(name: str, overhaul: bool, had_overhaul: bool, given: Mapping[str, Any]) -> str:
    """Returns the method where --method does not name it; `name` is the recipe's."""
    asks_for_kd = bool({"T", "w", "kd_weight"} & given.keys())
    if overhaul and not had_overhaul and not asks_for_kd:
        return "none"
    return "kd" if name == "none" and (asks_for_kd or not overhaul) else name


def _choose_features(
    features: Overhaul | None, overhaul: bool, given: Mapping[str, Any], photos: bool
) -> Overhaul | None:
    changes = {name: given[name] for name in FEATURE_FLAGS if name in given}
    if overhaul:
        return replace(features or Overhaul.defaults(photos), **changes)
    if changes:
        raise UserError(f"{' and '.join(map(flag, FEATURE_FLAGS))} belong to --overhaul")
    return None
