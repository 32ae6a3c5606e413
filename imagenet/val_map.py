"""ImageNet's validation photos as they are published, without class folders: their classes, from the usual files."""

import re
from collections import Counter
from pathlib import Path

from distill.errors import UserError

# FILE CLASS a line; CLASS is a synset, or its number from 0 on in the order of the synsets' names
BY_NAME = ("val_map.txt", "val.txt", "LOC_val_solution.csv")
# a line for each photo, in order of their names: a synset, or the number that the development kit gives it
BY_ORDER = ("imagenet_2012_validation_synset_labels.txt", "*validation_ground_truth.txt")
KIT = "map_clsloc.txt"  # SYNSET NUMBER NAME a line; the kit's numbers are not in the order of the synsets' names


def classes_of(root: Path, files: list[str], classes: list[str]) -> list[str]:
    """The class of each of the files of `root`/val, which lie there without folders. Raises UserError.

    The first of BY_NAME and BY_ORDER that lies in `root` or in val/ says it.
    """
    for name in BY_NAME:
        if map_file := _find(root, name):
            named = _by_name(map_file)
            found = [named.get(Path(file).name, named.get(Path(file).stem)) for file in files]
            if missing := [file for file, word in zip(files, found, strict=True) if word is None]:
                raise UserError(f"{map_file} does not name {missing[0]}, nor {len(missing) - 1} others in val")
            return _named([word for word in found if word], classes, map_file)
    for name in BY_ORDER:
        if map_file := _find(root, name):
            listed = [words[0] for words in _lines(map_file, 1)]
            if len(listed) != len(files):
                raise UserError(f"{map_file} has {len(listed)} lines for the {len(files)} photos of {root / 'val'}")
            if all(word.isdecimal() for word in listed):
                listed = _of_the_kit(root, map_file, listed)
            return _named(listed, classes, map_file)
    raise UserError(
        f"{root / 'val'} has photos but no class folders: sort them into val/CLASS/, or put {BY_NAME[0]} beside it, "
        f"of lines FILE CLASS, or {BY_NAME[2]}, or the development kit's ground truth and {KIT}"
    )


def _find(root: Path, pattern: str) -> Path | None:
    return next((file for folder in (root, root / "val") for file in sorted(folder.glob(pattern))), None)


def _lines(file: Path, least: int) -> list[list[str]]:
    """The words of each line, of which there are `least` or more, separated by white space or commas."""
    try:
        rows = [re.split(r"[\s,]+", line.strip()) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for row in rows:
        if len(row) < least:
            raise UserError(f"{file}: {' '.join(row)[:60]!r} is no line FILE CLASS")
    return rows


def _by_name(map_file: Path) -> dict[str, str]:
    """Returns FILE -> CLASS of the lines of a file, by names with their endings, and without where one alone has it.

    Raises UserError for a file that has two classes.
    """
    named: dict[str, str] = {}
    for words in _lines(map_file, 2):
        name = Path(words[0]).name
        if named.setdefault(name, words[1]) != words[1]:
            raise UserError(f"{map_file} gives {name} two classes, {named[name]} and {words[1]}")
    stems = Counter(Path(name).stem for name in named)
    return {Path(name).stem: word for name, word in named.items() if stems[Path(name).stem] == 1} | named


def _of_the_kit(root: Path, map_file: Path, numbers: list[str]) -> list[str]:
    kit = _find(root, KIT)
    if not kit:
        raise UserError(f"{map_file} has the development kit's numbers: put its {KIT} beside it, which names them")
    synsets = {words[1]: words[0] for words in _lines(kit, 2)}
    unknown = sorted(set(numbers) - set(synsets))
    if unknown:
        raise UserError(f"{kit} does not name number {unknown[0]} of {map_file}")
    return [synsets[number] for number in numbers]


def _named(words: list[str], classes: list[str], map_file: Path) -> list[str]:
    """The classes that these names and numbers mean."""
    known = {str(number): name for number, name in enumerate(classes)} | {name: name for name in classes}
    for word in words:
        if word not in known:
            raise UserError(f"{map_file}: {word!r} is no class of train/ and no number from 0 to {len(classes) - 1}")
    return [known[word] for word in words]
