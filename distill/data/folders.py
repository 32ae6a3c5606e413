"""Folders of images: one for each class, as torchvision's ImageFolder reads them."""

import os
from collections.abc import Callable
from pathlib import Path

from distill.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
UNLABELLED, NO_CLASS = -1, ""  # a label and a class's name for images that have none
EVERY_CLASS = ""  # the owner of a directory that holds all of them
Labelled = list[tuple[str, int]]  # files, with their labels
Identity = tuple[int, int] | str  # of a directory, whatever path leads there


def list_images(
    path: Path,
    train: str,
    test: str,
    *,
    unlabelled: bool = False,
    classes_of: Callable[[list[str], list[str]], list[str]] | None = None,
) -> tuple[list[str], dict[str, Labelled]]:
    """The classes, in order of their names, and the files of the folders `train` and `test` below `path`, in order.

    unlabelled: `train` may hold images and no class folders; their label is UNLABELLED. classes_of: the class of each
    file, from (files, classes of `train`), where `test` has no class folders. Raises UserError.
    """
    listings = {split: _list_split(path, split, f"{train}/CLASS/* and {test}/CLASS/*") for split in (train, test)}
    if classes_of and NO_CLASS in listings[test] and NO_CLASS not in listings[train]:
        listings[test] = _sorted_in(listings[test][NO_CLASS], sorted(listings[train]), classes_of)
    for split, listing in listings.items():
        if NO_CLASS in listing and not (unlabelled and split == train):
            raise UserError(f"{path / split} has images but no class folders: its images need their classes")
    classes = {split: set(listing) - {NO_CLASS} for split, listing in listings.items()}
    for here, there in ((train, test), (test, train)):
        if (only := sorted(classes[here] - classes[there])) and NO_CLASS not in listings[train]:
            hint = f"; unlabelled images lie in {path / train} itself, without folders"
            hint = hint if unlabelled and here == train and len(classes[train]) == 1 else ""
            raise UserError(f"class {only[0]!r} of {path / here} is not in {path / there}{hint}")
    names = sorted(classes[test])
    numbers = {NO_CLASS: UNLABELLED} | {name: k for k, name in enumerate(names)}
    return names, {
        split: [(file, numbers[name]) for name, files in listing.items() for file in files]
        for split, listing in listings.items()
    }


def images_below(directory: str) -> list[str]:
    """Returns the image files in `directory` and below it, in order of their paths; hidden ones are passed by.

    Links to directories are not followed. Raises UserError for a directory that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    found: list[str] = []
    for where, folders, files in os.walk(directory, onerror=unreadable):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found += [os.path.join(where, file) for file in files if is_image(file)]
    return sorted(found)


def _sorted_in(
    files: list[str], classes: list[str], classes_of: Callable[[list[str], list[str]], list[str]]
) -> dict[str, list[str]]:
    """Class -> its files, as if they lay in class folders."""
    listing: dict[str, list[str]] = {name: [] for name in classes}
    for file, name in zip(files, classes_of(files, classes), strict=True):
        listing[name].append(file)
    return {name: files_of_class for name, files_of_class in listing.items() if files_of_class}


def _list_split(path: Path, split: str, needed: str) -> dict[str, list[str]]:
    """Returns class -> image files in order of their names, NO_CLASS -> images where there are no class folders.

    Hidden files and folders, and files that are no images by name, are passed by. Raises UserError.
    """
    root = path / split
    if not root.is_dir():
        other = {"test": "val", "val": "test"}.get(split, "")
        kind = "train.sh is for photos, which have" if split == "test" else "trainCE.sh is for small images, which have"
        hint = f"; it has {other!r}, so rename that, or {kind} {other!r}" if other and (path / other).is_dir() else ""
        if not hint and split != "train" and (path / "train").is_dir():
            hint = f"; move a fifth of the files of each class there, from train/CLASS to {split}/CLASS"
        raise UserError(f"{path} has no directory {split!r}: it needs {needed} images{hint}")
    folders = [entry for entry in sorted(root.iterdir()) if not entry.name.startswith(".") and entry.is_dir()]
    owners = _owners(root, folders)
    listing = {}
    for folder in folders:
        files = _files_below(folder, owners)
        images = sorted(file for file in files if is_image(file))
        if others := len(files) - len(images):
            print(f"note: {others} files in {folder} are no images by their names and are passed by")
        if not images:
            raise UserError(f"class {folder.name!r} in {root} has no images ({', '.join(sorted(SUFFIXES))})")
        listing[folder.name] = images
    loose = sorted(str(file) for file in root.iterdir() if is_image(file.name) and file.is_file())
    if loose and listing:
        raise UserError(f"{root} has class folders and images beside them, such as {loose[0]}: one or the other")
    if not loose and not listing:
        raise UserError(f"{root} has no class folders with images in them")
    return listing or {NO_CLASS: loose}


def _owners(root: Path, folders: list[Path]) -> dict[Identity, str]:
    """Whose each directory is: the class folders their classes', what they lie in everyone's."""
    real = Path(os.path.realpath(root))
    owners = {_identity(str(parent)): EVERY_CLASS for parent in (real, *real.parents)}
    for folder in folders:
        owner = owners.setdefault(_identity(str(folder)), folder.name)
        if owner != folder.name:
            raise UserError(f"{folder} leads to {_of_whom(owner)}: an image would have several classes; remove it")
    return owners


def _files_below(folder: Path, owners: dict[Identity, str]) -> list[str]:
    """Returns the files below a class's folder; hidden ones are passed by.

    Each real directory is visited once, links after all others, so that a link into the class itself adds nothing.
    Raises UserError where a directory is another class's.
    """
    files: list[str] = []
    pending, links = [str(folder)], list[str]()
    while pending or links:
        where = pending.pop() if pending else links.pop(0)
        if where != str(folder) and not _is_new(where, folder.name, owners):
            continue
        try:
            with os.scandir(where) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {where}: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_directory(entry):
                files.append(entry.path)
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                pending.append(entry.path)
    return files


def _is_new(directory: str, name: str, owners: dict[Identity, str]) -> bool:
    """Whether class `name` comes here for the first time; the directory then is its own. Raises UserError."""
    identity = _identity(directory)
    if identity not in owners:
        owners[identity] = name
        return True
    if owners[identity] == name:
        return False
    raise UserError(
        f"{directory}, in class {name!r}, leads to {_of_whom(owners[identity])}: an image would have several classes; "
        "remove it"
    )


def _of_whom(owner: str) -> str:
    return "the folder of all classes" if owner == EVERY_CLASS else f"the folder of class {owner!r}"


def _identity(directory: str) -> Identity:
    try:
        status = os.stat(directory)
    except OSError as error:
        raise UserError(f"cannot read the folder {directory}: {error.strerror}") from None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(directory)  # some have no numbers


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_image(file: str) -> bool:
    """Returns whether a file is an image by its name, and not hidden."""
    name = os.path.basename(file)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
