"""Fields of dataclasses that know what they allow: cli.py makes a flag from each. Knows no torch: it loads at once."""

import math
from dataclasses import Field, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from distill.errors import UserError


def option(
    default: Any,
    help: str,
    *,
    group: str = "distillation",
    photos: Any = None,
    flags: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """Returns a dataclass field with its flag.

    photos: the default on photos, where that is another one. group: what the flag is listed under. flags: further
    spellings; aliases: those that --help does not show. The others are the values that the field allows.
    """
    metadata = {"help": help, "group": group, "flags": flags, "aliases": aliases, "choices": choices}
    metadata |= {"photos": default if photos is None else photos}
    return field(default=default, metadata={**metadata, "least": least, "most": most, "above": above, "below": below})


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


_hints = cache(get_type_hints)  # evaluates every annotation of a class: each check would take a millisecond


def value_type(owner: type, name: str) -> type:
    """Returns the type of a field's values: `int` for `int` and for `int | None`."""
    hint = _hints(owner)[name]
    kind: type = next((a for a in get_args(hint) if a is not type(None)), hint)
    return kind


def allowed(option_field: "Field[Any]", kind: type) -> str:
    """The values a field takes, in words: `an integer, at least 1`."""
    limits = option_field.metadata
    if limits["choices"]:
        return "one of " + ", ".join(limits["choices"])
    words = [{int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]]
    if limits["above"] > -math.inf:
        words.append(f"above {limits['above']:g}")
    if limits["least"] > -math.inf:
        words.append(f"at least {limits['least']:g}")
    if limits["below"] < math.inf:
        words.append(f"below {limits['below']:g}")
    if limits["most"] < math.inf:
        words.append(f"at most {limits['most']:.10g}")
    return ", ".join(words)


def validate(settings: Any) -> None:
    """Checks every field made with `option`. Raises UserError for the first that is out of range."""
    for option_field in fields(settings):
        if option_field.metadata:
            check(type(settings), option_field, getattr(settings, option_field.name))


def check(owner: type, option_field: "Field[Any]", value: Any) -> None:
    """Raises UserError `--flag must be ..., got ...` unless `value` is allowed for the field."""
    kind = value_type(owner, option_field.name)
    if value is None and type(None) in get_args(_hints(owner)[option_field.name]):
        return
    fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if isinstance(value, bool) and kind is not bool:
        fits = False
    if fits and isinstance(value, str):
        choices = option_field.metadata["choices"]
        fits = value in choices if choices else value != ""
    elif fits:
        limits = option_field.metadata
        fits = math.isfinite(value) and limits["least"] <= value <= limits["most"]
        fits = fits and limits["above"] < value < limits["below"]
    if not fits:
        raise UserError(f"{flag(option_field.name)} must be {allowed(option_field, kind)}, got {value!r}")


def channels(text: str) -> tuple[float, float, float]:
    """`0.5` or `0.49,0.48,0.45` -> a number for each of red, green and blue. Raises ValueError."""
    numbers = [float(part) for part in text.split(",")]
    red, green, blue = numbers * 3 if len(numbers) == 1 else numbers
    return red, green, blue


def check_normalisation(settings: Any, mean: str, std: str) -> None:
    """Raises UserError unless both of two fields are given, or none, with numbers for pixels in [0, 1]."""
    given = {name: getattr(settings, name) for name in (mean, std)}
    if None in given.values():
        if set(given.values()) != {None}:
            raise UserError(f"{flag(mean)} and {flag(std)} belong together: give both or none")
        return
    for name, text in given.items():
        try:
            fits = all(0 <= value <= 1 and (value or name == mean) for value in channels(text))
        except ValueError:
            fits = False
        if not fits:
            hint = "one number or three with commas, for pixels in [0, 1] (a value of 255 is 1 there)"
            raise UserError(f"{flag(name)} must be {hint}, got {text!r}")
