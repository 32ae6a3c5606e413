"""Flags made from the fields of Recipe and Options; one-line errors; the exit code of a command."""

import argparse
import difflib
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from distill.config import output
from distill.config.environment import find_ranks, is_joined
from distill.config.method_flags import ALIASES, CHOICES, FEATURE_FLAGS, METHOD_FLAGS, Choice
from distill.config.recipe import Options, Recipe
from distill.errors import UserError, lost_process, out_of_memory, too_many_files
from distill.losses import FEATURES, METHODS
from distill.losses.feature_method import FeatureMethod
from distill.losses.method import Method
from distill.losses.overhaul import Overhaul
from distill.options import allowed, flag, value_type

LOSS_LEGEND = "s, t: logits of student and teacher, y: label; in nats, mean over the images of a batch"
DISTILLATION_FIELDS = (
    *("teacher_arch", "ensemble", "teacher_image_size", "teacher_checkpoint", "teacher_precision", "teacher_weights"),
    *("teacher_mean", "teacher_std"),
    *("top_k", "store", "store_limit"),
    *(*METHOD_FLAGS, *FEATURE_FLAGS, *CHOICES, "show_features"),
)
MEANT = {  # what other libraries call a flag
    **dict.fromkeys(("--gpu", "--gpus", "--cuda"), "--device"),
    **dict.fromkeys(("--amp", "--fp16", "--bf16"), "--precision"),
    **dict.fromkeys(("--model", "--student"), "--arch"),
    **dict.fromkeys(("--root", "--data-dir", "--data-path"), "--data"),
    **dict.fromkeys(("--output-dir", "--save-dir"), "--output"),
    "--learning-rate": "--lr",
    "--num-workers": "--workers",
    "--temperature": "--T",
}


Settings = TypeVar("Settings", bound=Any)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviations (an abbreviation changes meaning when a flag is added)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message of argparse."""
        raise UserError(re.sub(r"^argument (?:-\w/)?(--[\w-]+)\S*: must be", r"\1 must be", message))

    def parse(self, argv: Sequence[str], *, words: bool = False) -> argparse.Namespace:
        """parse_args that takes `_` for `-` in flags and names the nearest flag of an unknown one.

        words: whether arguments without a flag may stand between flags.
        """
        parse = self.parse_known_intermixed_args if words else self.parse_known_args
        namespace, unknown = parse([_hyphenate(token) for token in argv])
        if unknown:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            names = [name for action in shown for name in action.option_strings]
            name = unknown[0].split("=")[0]
            if name in (*map(flag, DISTILLATION_FIELDS), *ALIASES):
                raise UserError(f"unknown argument {name} without a teacher: it is for trainKD.sh, and train.sh --kd")
            longer = [other for other in names if other.startswith(f"{name}-")]
            meant = [MEANT[name]] if MEANT.get(name) in names else []
            near = meant or longer[:3] or difflib.get_close_matches(name, names, n=3, cutoff=0.6)
            hint = f"; near it: {', '.join(near)}" if near else "; --help lists the flags"
            raise UserError(f"unknown argument {unknown[0]}{hint}")
        return namespace


def _hyphenate(token: str) -> str:
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else token


def _converter(owner: type, option_field: "Field[Any]") -> Callable[[str], Any]:
    kind = value_type(owner, option_field.name)

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {allowed(option_field, kind)}, got {text!r}") from None

    return convert


def _add_flags(parser: Parser, defaults: Any, hidden: Sequence[str] = (), *, switches: bool = False) -> None:
    """Adds a flag for each field of `defaults`, a dataclass made with `option`, but those that are `hidden`.

    switches: flags of type bool can be turned off as well, since a recipe may have turned them on.
    """
    for option_field in fields(defaults):
        if option_field.metadata and option_field.name not in hidden:
            _add_flag(parser, option_field, defaults, switches)


def _add_flag(
    parser: Parser, option_field: "Field[Any]", defaults: Any, switches: bool, *, listed: bool = True
) -> None:
    groups = {group.title: group for group in parser._action_groups}
    title = option_field.metadata["group"]
    group = groups[title] if title in groups else parser.add_argument_group(title)
    further = option_field.metadata["flags"]
    names = [*(f for f in further if len(f) == 2), flag(option_field.name), *(f for f in further if len(f) > 2)]
    value, words = getattr(defaults, option_field.name), option_field.metadata["help"]
    default = {True: "on", False: None}[value] if isinstance(value, bool) else value
    shown = words if default is None else f"{words} (default: {default})"
    settings: dict[str, Any] = {"dest": option_field.name, "default": argparse.SUPPRESS}
    if value_type(type(defaults), option_field.name) is bool:
        settings["action"] = argparse.BooleanOptionalAction if switches or value else "store_true"
    else:
        settings["type"] = _converter(type(defaults), option_field)
        settings["metavar"] = "|".join(option_field.metadata["choices"]) or option_field.name.split("_")[-1].upper()
    group.add_argument(*names, help=shown if listed else argparse.SUPPRESS, **settings)
    for alias in option_field.metadata["aliases"]:
        group.add_argument(alias, help=argparse.SUPPRESS, **settings)


def _add_method_flags(parser: Parser, method: Method, features: FeatureMethod, photos: bool) -> None:
    """Adds the flags of all methods; --help lists those of `method` and `features`."""
    _add_flags(parser, Choice(), switches=True)
    for shown, others in ((method, METHODS.values()), (features, FEATURES.values())):
        _add_flags(parser, shown, switches=True)
        added = {known.name for known in fields(shown)}
        for other in others:
            for known in fields(other):
                if known.name not in added:
                    _add_flag(parser, known, other.defaults(photos), True, listed=False)
                    added.add(known.name)


def _shown_methods(argv: Sequence[str], base: Recipe) -> tuple[Method, FeatureMethod] | None:
    """Returns the methods whose flags --help lists: those of --method and --features, else of `base`."""
    if not base.method:
        return None
    parser = Parser(add_help=False)
    for name in ("--method", "--features", "--T", "--w"):
        parser.add_argument(name)
    given = parser.parse_known_args([_hyphenate(token) for token in argv])[0]
    alone = given.features in FEATURES and given.method is None and not given.T and not given.w
    named = given.method if given.method in METHODS else "none" if alone else base.method.name
    method = base.method if named == base.method.name else METHODS[named].defaults(base.photos)
    usual = base.features or Overhaul.defaults(base.photos)
    return method, FEATURES[given.features].defaults(base.photos) if given.features in FEATURES else usual


def parse_flags(
    argv: Sequence[str], defaults: Settings, *, prog: str, description: str, positional: str | None = None
) -> Settings:
    """Returns `defaults`, a dataclass made with `option`, with the flags in `argv`.

    positional: see parse(). Raises UserError.
    """
    parser = Parser(prog=prog, usage=_usage(positional), description=description)
    _add_positional(parser, positional)
    _add_flags(parser, defaults)
    return replace(defaults, **_given(parser, argv, positional))


def parse_words(
    argv: Sequence[str], defaults: Settings, *, prog: str, description: str, words: str
) -> tuple[Settings, list[str]]:
    """Returns `defaults` with the flags in `argv`, and the arguments without a flag. Raises UserError.

    words: what --help calls these.
    """
    parser = Parser(prog=prog, usage=f"%(prog)s {words} [flags]", description=description)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    _add_flags(parser, defaults)
    given = vars(parser.parse(argv, words=True))
    return replace(defaults, **{key: value for key, value in given.items() if key != "words"}), given["words"]


def _usage(positional: str | None) -> str:
    return f"%(prog)s {f'{positional.upper()} ' if positional else ''}[flags]"


def _add_positional(parser: Parser, positional: str | None) -> None:
    if positional:
        parser.add_argument(
            f"first_{positional}", nargs="?", metavar=positional.upper(), help=f"the same as {flag(positional)}"
        )


def _given(parser: Parser, argv: Sequence[str], positional: str | None) -> dict[str, Any]:
    given = vars(parser.parse(argv))
    first = given.pop(f"first_{positional}", None)
    if positional and first is not None and given.setdefault(positional, first) != first:
        raise UserError(f"{first} and {flag(positional)} {given[positional]}: give one of them")
    return given


def parse(
    argv: Sequence[str],
    *,
    prog: str,
    recipes: Mapping[str, Recipe],
    default: str,
    description: str,
    examples: str,
    options: Options | None = None,
    positional: str | None = None,
) -> tuple[Any, Any]:
    """The recipe and the options that `argv` asks for: the named recipe (`default` if none), with the flags given.

    `recipes` of one class, `options` of another: subclasses of Recipe and Options where there are more flags.
    `positional`: an option that may also be given by itself, as the first word.
    Without a teacher in the default recipe the flags of distillation do not exist. `--show-recipe` prints the recipe
    as JSON and exits. Raises UserError for anything wrong.
    """
    names = _of_the_kind(recipes, recipes[default].objective)
    shown = textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    given, settled = read_flags(
        argv,
        recipes[default],
        options or Options(),
        prog=prog,
        description=description,
        epilog=f"named recipes: {', '.join(names)} (default: {default})\n\nexamples:\n{shown}",
        positional=positional,
    )
    name = find_recipe(settled.recipe or default, recipes, recipes[default].objective)
    recipe = recipes[name].with_flags(given)
    if settled.show_recipe:
        print(json.dumps({"recipe": name, **recipe.to_dict()}, indent=2))
        raise SystemExit(0)
    if "finetune" in name and not (recipe.pretrained or settled.init or settled.resume):
        raise UserError(f"--recipe {name} goes on from trained weights: give it --init FILE, as a run's best.pt")
    return recipe, settled


def read_flags(
    argv: Sequence[str],
    base: Recipe,
    options: Settings,
    *,
    prog: str,
    description: str,
    epilog: str = "",
    positional: str | None = None,
) -> tuple[dict[str, Any], Settings]:
    """Returns the fields of a recipe that `argv` gives, by name, and `options` with those that it gives.

    The flags of distillation exist where `base` has a teacher. Raises UserError.
    """
    hidden, shown = DISTILLATION_FIELDS if base.objective == "ce" else (), _shown_methods(argv, base)
    if shown:
        method, features = shown
        lines = [f"loss = {' + '.join(method.terms)}", *filter(None, [method.note]), LOSS_LEGEND]
        lines.append(f"--features {features.name}: + feature_weight * {features.term}")
        description = "\n  ".join([f"{description}\n", *lines])
    parser = Parser(prog=prog, usage=_usage(positional), description=description, epilog=epilog)
    _add_positional(parser, positional)
    _add_flags(parser, base, hidden, switches=True)
    if shown:
        _add_method_flags(parser, *shown, base.photos)
    _add_flags(parser, options, hidden)
    given = _given(parser, argv, positional)
    return given, replace(options, **{f.name: given.pop(f.name) for f in fields(options) if f.name in given})


def find_recipe(text: str, recipes: Mapping[str, Recipe], objective: str) -> str:
    """The name of the recipe that `text` means: with a teacher `student` is `student_kd`. Raises UserError."""
    name, names = text.replace("-", "_").lower(), _of_the_kind(recipes, objective)
    full = name if name in names else f"{name}_kd"
    if full not in names:
        raise UserError(f"--recipe must be one of {', '.join(names)}, got {text!r}")
    return full


def _of_the_kind(recipes: Mapping[str, Recipe], objective: str) -> list[str]:
    return [name for name, recipe in recipes.items() if recipe.objective == objective]


def check_file(path: str | None, name: str = "--json") -> None:
    """Raises UserError unless a file can be written at `path`, which the flag `name` gives; None for none."""
    if not path:
        return
    target = Path(path).resolve()
    try:
        usable = target.parent.is_dir() and not target.is_dir()
        usable = usable and os.access(target if target.exists() else target.parent, os.W_OK)
    except OSError:  # a name that is too long
        usable = False
    if not usable:
        raise UserError(f"{name} {path}: there is no such directory, or it is one itself, or cannot be written to")


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run `main` with the command line, then exit: 0, or 1 or 2 with one line, or 128 + N after signal N."""
    output.prepare()
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        if not error.already_reported:
            _tell(str(error), error.exit_code)
        code = error.exit_code
    except KeyboardInterrupt:
        code = _tell("interrupted", 130)
    except BrokenPipeError:
        code = 141
    except (ModuleNotFoundError, MemoryError, RuntimeError, OSError) as error:
        line, code = _explain(error)
        if not line:
            raise
        _tell(line, code)
    if code and is_joined():
        # the end of an interpreter that is still connected to others may abort, code 134 (torch 2.15 and before);
        # every line is out already
        os._exit(code)
    sys.exit(code)


def _tell(text: str, code: int) -> int:
    """One line on stderr, from one of several processes with its number. Returns `code`."""
    line = " ".join(text.split())
    line = f"error: {line}" if code in (1, 2) else line
    rank = find_ranks().rank if is_joined() else 0
    print(f"process {rank}: {line}" if rank else line, file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """A line for an error that is the machine's or the installation's, and the exit code; no line for a bug."""
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").split(".")[0] in ("distill", "cifar10", "imagenet"):
            return "", 1
        install = "source .venv/bin/activate after bash scripts/quickstart.sh, or pip install -r requirements.txt"
        return f"the package {error.name} is missing; {install}", 2
    if out_of_memory(error):
        return "out of memory; try a smaller --batch-size; what was saved is kept", 1
    if too_many_files(error):
        return f"too many open files ({error}): raise `ulimit -n`, or lower --workers; what was saved is kept", 1
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if "No usable temporary directory" in str(error):
        return f"{getattr(error, 'strerror', error)}: set TMPDIR to one that can be written to", 2
    if lost_process(error):
        gone = str(error).splitlines()[0]
        return f"another process of the run is gone ({gone:.160}); what was saved is kept", 1
    if "does not have a deterministic implementation" in str(error):
        return f"{str(error).split(',')[0]}: leave out --deterministic", 1
    return "", 1
