"""Folders of images: links, hidden folders, and layouts that need a word; for small images and photos alike."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from cifar10.data import load_data as load_small
from distill.data.folders import SUFFIXES, list_images
from distill.errors import BrokenImage, UserError
from imagenet.data import load_data as load_photos
from imagenet.loader import Workers


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ and test/ with classes a, b, c, of two images each; val is a copy of test."""
    for split in ("train", "test", "val"):
        for k, name in enumerate("abc"):
            for place in ("", "deep"):
                where = tmp_path / "data" / split / name / place
                where.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (80 * k, 0, 0)).save(where / "0.png")
    return tmp_path / "data"


def counts(root: Path) -> list[dict[int, int]]:
    """How many images each label has, as small images (train, test) and photos (train, val) are listed."""
    small, photos = load_small(str(root)), load_photos(str(root), Workers(0))
    splits = (small.train_labels, small.test_labels, photos.train_labels, photos.val_labels)
    return [dict(enumerate(labels.bincount().tolist())) for labels in splits]


INSIDE: dict[str, Callable[[Path], None]] = {
    "to itself": lambda split: (split / "a" / "self").symlink_to("."),
    "absolute": lambda split: (split / "a" / "self").symlink_to(split / "a"),
    "to a folder of the class": lambda split: (split / "a" / "aaa").symlink_to("deep"),
    "up from below": lambda split: (split / "a" / "deep" / "up").symlink_to("../../a"),
    "in a circle": lambda split: (
        (split / "a" / "one").symlink_to("two"),
        (split / "a" / "two").symlink_to("one"),
    )[0],
    "twice": lambda split: (
        (split / "a" / "one").symlink_to("deep"),
        (split / "a" / "two").symlink_to("deep"),
    )[0],
    "to nowhere": lambda split: (split / "a" / "gone").symlink_to("nowhere"),
}


@pytest.mark.parametrize("split", ["train", "test", "val"])
@pytest.mark.parametrize("link", INSIDE.values(), ids=INSIDE)
def test_links_inside_a_class_add_nothing(link: Callable[[Path], None], split: str, root: Path) -> None:
    before = [list_images(root, "train", test) for test in ("test", "val")]
    link(root / split)
    assert [list_images(root, "train", test) for test in ("test", "val")] == before
    assert counts(root) == [{0: 2, 1: 2, 2: 2}] * 4


ACROSS: dict[str, tuple[Callable[[Path], None], str]] = {
    "to all classes": (lambda split: (split / "a" / "loop").symlink_to(split), "a/loop, in class 'a', leads to the f"),
    "to the data": (lambda split: (split / "a" / "x").symlink_to("../.."), "leads to the folder of all classes"),
    "to the root": (lambda split: (split / "a" / "x").symlink_to("/"), "leads to the folder of all classes"),
    "to another class": (lambda split: (split / "b" / "x").symlink_to("../a"), "b/x, in class 'b', leads to"),
    "below another": (lambda split: (split / "c" / "x").symlink_to("../a/deep"), "c/x, in class 'c', leads to the"),
    "a class": (lambda split: (split / "d").symlink_to("a"), "d leads to the folder of class 'a'"),
    "part of a class": (lambda split: (split / "d").symlink_to("a/deep"), "a/deep, in class 'a', leads to"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["train", "test", "val"])
@pytest.mark.parametrize("name", ACROSS)
def test_links_into_another_class_are_refused(name: str, split: str, root: Path) -> None:
    link, message = ACROSS[name]
    link(root / split)
    with pytest.raises(UserError, match=message):
        load_photos(str(root), Workers(0)) if split == "val" else load_small(str(root))


def test_folders_elsewhere_may_be_linked(root: Path, tmp_path: Path) -> None:
    for split in ("train", "test", "val"):
        os.rename(root / split / "a", tmp_path / f"{split}-a")
        (root / split / "a").symlink_to(tmp_path / f"{split}-a")
        (tmp_path / f"{split}-more").mkdir()
        (tmp_path / f"{split}-more" / "1.pgm").write_bytes(b"P5 1 1 255\nx")
        (root / split / "b" / "more").symlink_to(tmp_path / f"{split}-more")
    assert counts(root) == [{0: 2, 1: 3, 2: 2}] * 4
    os.rename(root / "val", root / "old")
    (root / "val").symlink_to("train")
    assert len(load_photos(str(root), Workers(0)).val_files) == 7


def test_hidden_folders_are_passed_by_at_every_depth(root: Path) -> None:
    for split in ("train", "test", "val"):
        for where in (".thumbs", "a/.thumbs", "a/deep/.thumbs", "a/deep/.thumbs/deeper"):
            (root / split / where).mkdir()
            Image.new("RGB", (32, 32)).save(root / split / where / "x.png")
    assert counts(root) == [{0: 2, 1: 2, 2: 2}] * 4


def test_every_suffix_of_imagefolder_is_read() -> None:
    assert set(IMG_EXTENSIONS) <= SUFFIXES


def test_links_to_files_that_are_gone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test", "val"):
        (root / split / "b" / "gone.png").symlink_to("nowhere")
    for load in (load_small, lambda path, **skip: load_photos(path, Workers(0), **skip)):
        with pytest.raises(BrokenImage, match=r"2 images are broken: .*b/gone\.png.*; .*b/gone\.png.*No such file"):
            load(str(root))
        load(str(root), skip_bad_images=True)
        assert capsys.readouterr().out.count("left out: cannot decode") == 2


def test_how_unlabelled_images_are_laid_out(root: Path) -> None:
    os.rename(root / "train", root / "old")
    (root / "train" / "unlabeled").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(root / "train" / "unlabeled" / "x.png")
    with pytest.raises(UserError, match=r"'unlabeled' .* is not in .*test; unlabelled images lie in .*train itself"):
        load_small(str(root))


def test_a_folder_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(where: str) -> object:
        if where.endswith("b/deep"):
            raise PermissionError(13, "Permission denied")
        return scan(where)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*train/b/deep: Permission denied"):
        list_images(root, "train", "test")
