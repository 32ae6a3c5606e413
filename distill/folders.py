"""Folders of images: one for each class, as torchvision's ImageFolder reads them."""

import os
from pathlib import Path

from distill.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}
UNLABELLED, NO_CLASS = -1, ""  # a label and a class's name for images that have none
Labelled = list[tuple[str, int]]  # files, with their labels


def list_images(
    path: Path, train: str, test: str, *, unlabelled: bool = False
) -> tuple[list[str], dict[str, Labelled]]:
    """The classes, in order of their names, and the files of the folders `train` and `test` below `path`, in order.

    unlabelled: `train` may hold images and no class folders; their label is UNLABELLED. Raises UserError.
    """
    listings = {split: _list_split(path, split, f"{train}/CLASS/* and {test}/CLASS/*") for split in (train, test)}
    for split, listing in listings.items():
        if NO_CLASS in listing and not (unlabelled and split == train):
            raise UserError(f"{path / split} has images but no class folders: its images need their classes")
    classes = {split: set(listing) - {NO_CLASS} for split, listing in listings.items()}
    for here, there in ((train, test), (test, train)):
        if (only := sorted(classes[here] - classes[there])) and NO_CLASS not in listings[train]:
            raise UserError(f"class {only[0]!r} of {path / here} is not in {path / there}")
    names = sorted(classes[test])
    numbers = {NO_CLASS: UNLABELLED} | {name: k for k, name in enumerate(names)}
    return names, {
        split: [(file, numbers[name]) for name, files in listing.items() for file in files]
        for split, listing in listings.items()
    }


def _list_split(path: Path, split: str, needed: str) -> dict[str, list[str]]:
    """Class -> image files in order of their names, NO_CLASS -> images where there are no class folders.
    Hidden files and files that are no images by name are passed by."""
    root = path / split
    if not root.is_dir():
        raise UserError(f"{path} has no directory {split!r}: it needs {needed} images")
    listing = {}
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"cannot read the folder {folder}")
        found = [os.path.join(where, n) for where, _, names in os.walk(folder, followlinks=True) for n in names]
        files = [file for file in found if not os.path.relpath(file, folder).startswith(".")]
        images = sorted(file for file in files if _is_image(file))
        if others := len(files) - len(images):
            print(f"note: {others} files in {folder} are no images by their names and are passed by")
        if not images:
            raise UserError(f"class {folder.name!r} in {root} has no images ({', '.join(sorted(SUFFIXES))})")
        listing[folder.name] = images
    loose = sorted(str(file) for file in root.iterdir() if _is_image(file.name) and file.is_file())
    if loose and listing:
        raise UserError(f"{root} has class folders and images beside them, such as {loose[0]}: one or the other")
    if not loose and not listing:
        raise UserError(f"{root} has no class folders with images in them")
    return listing or {NO_CLASS: loose}


def _is_image(file: str) -> bool:
    name = os.path.basename(file)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
