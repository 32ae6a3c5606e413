"""Which method the flags ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from distill.errors import UserError
from distill.losses import FEATURES, METHODS
from distill.losses.feature_method import FeatureMethod
from distill.losses.method import Method
from distill.losses.overhaul import Overhaul
from distill.options import flag, option, validate

FEATURE_FLAGS = tuple(dict.fromkeys(f.name for method in FEATURES.values() for f in fields(method)))
CHOICES = ("method", "features", "overhaul")
METHOD_FLAGS = tuple(dict.fromkeys(f.name for method in METHODS.values() for f in fields(method)))
ALIASES = tuple(alias for method in METHODS.values() for f in fields(method) for alias in f.metadata["aliases"])


@dataclass(frozen=True)
class Choice:
    """The flags that choose the method; each method's own are its fields."""

    method: str | None = option(
        None,
        "loss on logits; --method NAME --help shows its flags; none is for --features",
        choices=tuple(METHODS),
    )
    features: str | None = option(
        None,
        "loss on the teacher's features: beside --method where that is given, else in place of the loss on logits; "
        "--features NAME --help shows its flags; none is off",
        choices=(*FEATURES, "none"),
    )
    overhaul: bool = option(False, "the same as --features overhaul")

    def __post_init__(self) -> None:
        validate(self)


def choose_method(
    method: Method, features: FeatureMethod | None, given: Mapping[str, Any], photos: bool
) -> tuple[Method, FeatureMethod | None]:
    """Returns the method and the features that the flags `given` ask for, by name, beside those of a recipe.

    --method, --features: another one starts from its own defaults. Features by themselves take the place of the logits,
    with T, w or kd_weight they stand beside kd. Raises UserError for a flag that the method does not take.
    """
    if (named := given.get("method")) in FEATURES:
        raise UserError(f"--method {named} is a loss on features: --features {named}")
    Choice(named, given.get("features"))  # raises UserError for a name that there is not
    chosen = _feature_name(features, given)
    name = given.get("method") or _implied(method.name, chosen is not None, features is not None, given)
    own = {key: value for key, value in given.items() if key not in (*CHOICES, *FEATURE_FLAGS)}
    start = method if name == method.name else METHODS[name].defaults(photos)
    return start.changed(own, photos), _choose_features(features, chosen, given, photos)


def _feature_name(features: FeatureMethod | None, given: Mapping[str, Any]) -> str | None:
    """Returns the name of the method on features that the flags ask for, None for none. Raises UserError."""
    named, overhaul = given.get("features"), given.get("overhaul")
    if named and overhaul and named != Overhaul.name:
        raise UserError(f"--overhaul is --features {Overhaul.name}, and here is --features {named}: give one of them")
    if named or overhaul is None:
        name = named or (features.name if features else None)
        return None if name == "none" else name
    return Overhaul.name if overhaul else None


def _implied(name: str, features: bool, had_features: bool, given: Mapping[str, Any]) -> str:
    """Returns the method where --method does not name it; `name` is the recipe's."""
    asks_for_kd = bool({"T", "w", "kd_weight"} & given.keys())
    if features and not had_features and not asks_for_kd:
        return "none"
    return "kd" if name == "none" and (asks_for_kd or not features) else name


def _choose_features(
    features: FeatureMethod | None, name: str | None, given: Mapping[str, Any], photos: bool
) -> FeatureMethod | None:
    changes = {key: given[key] for key in FEATURE_FLAGS if key in given}
    if name is None:
        if changes:
            raise UserError(f"{', '.join(map(flag, changes))}: for a method on features, --features NAME")
        return None
    start = features if features and features.name == name else FEATURES[name].defaults(photos)
    takes = [f.name for f in fields(start)]
    for key in changes:
        if key not in takes:
            raise UserError(f"{flag(key)} is no flag of --features {name}, which takes {', '.join(map(flag, takes))}")
    return replace(start, **changes)
