"""CIFAR-like data: the sample, .npz files, folders; and everything that can be wrong with them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cifar10 import data as data_module
from cifar10 import folder
from cifar10.data import CLASSES, load_data
from distill.errors import BrokenImage, UserError


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3, size: int = 32) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")
    return root


def make_npz(path: Path, **changes: Any) -> Path:
    arrays = {
        "train_images": np.zeros((6, 32, 32, 3), np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": np.zeros((3, 32, 32, 3), np.uint8),
        "test_labels": np.array([0, 1, 2]),
    }
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


# ---------------------------------------------------------------------------------------------------------- the sample
def test_sample_is_balanced_real_cifar10() -> None:
    data = load_data("sample")
    assert data.classes == CLASSES
    assert data.train_images.shape == (2000, 32, 32, 3)
    assert data.test_images.shape == (1000, 32, 32, 3)
    assert data.train_labels.bincount().tolist() == [200] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    assert data.digest == "575c659e57c23ecde6e8d9ac37e6f15aadfcfd60a34dca4c39fdd60a2b7e3cd3"
    assert 4_000_000 < data_module.SAMPLE.stat().st_size < 6_000_000
    mean = data.train_images.double().mean((0, 1, 2)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.015)


# ----------------------------------------------------------------------------------------------------------- npz files
def test_npz(small_npz: Path) -> None:
    data = load_data(str(small_npz))
    assert data.name == "small"
    assert data.classes == CLASSES[:4]
    sample = load_data("sample")
    assert torch.equal(data.train_images[10:20], sample.train_images[200:210])


def test_npz_without_class_names(tmp_path: Path) -> None:
    assert load_data(str(make_npz(tmp_path / "x.npz"))).classes == ("0", "1", "2")


def test_npz_of_another_size_is_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_npz(tmp_path / "x.npz", train_images=np.full((6, 64, 48, 3), 7, np.uint8))
    data = load_data(str(path))
    assert data.train_images.shape == (6, 32, 32, 3)
    assert (data.train_images == 7).all()
    assert "64x48 are resized to 32x32" in capsys.readouterr().out


def test_unsigned_labels(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    data = load_data(str(make_npz(tmp_path / "a.npz", train_labels=labels, test_labels=labels[:3])))
    assert data.train_labels.tolist() == labels.tolist()


GREY = np.arange(6 * 32 * 32, dtype=np.uint8).reshape(6, 32, 32)


@pytest.mark.parametrize("images", [GREY, GREY[..., None]], ids=["(N, H, W)", "(N, H, W, 1)"])
def test_grey_images_and_columns_of_labels(
    images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the files of MedMNIST are, which hold a validation part too."""
    labels = np.array([[0], [1], [2], [0], [1], [2]], np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "val_images": images, "val_labels": labels}
    path = make_npz(tmp_path / "x.npz", **arrays, test_images=images[:3], test_labels=labels[:3])
    data = load_data(str(path.rename(tmp_path / "mnist.NPZ")))
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train_images.shape == (6, 32, 32, 3)
    for channel in range(3):
        assert np.array_equal(data.train_images[..., channel].numpy(), GREY)
    assert "note: val_images, val_labels of" in capsys.readouterr().out


def test_grey_images_of_another_size(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "x.npz", train_images=np.full((6, 28, 28), 9, np.uint8))
    assert (load_data(str(path)).train_images == 9).all()


@pytest.mark.parametrize(
    "classes",
    [
        np.array(["cat", "dög", "frog"], dtype=object),
        np.array([b"cat", "dög".encode(), b"frog"], dtype=object),
        np.array([b"cat", "dög".encode(), b"frog"]),
        np.array(["cat", "dög", "frog"]),
    ],
    ids=["objects", "objects of bytes", "bytes", "strings"],
)
def test_class_names(classes: np.ndarray, tmp_path: Path) -> None:
    assert load_data(str(make_npz(tmp_path / "x.npz", classes=classes))).classes == ("cat", "dög", "frog")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/distill-npz-attack",)


def test_nothing_in_a_npz_is_run(tmp_path: Path) -> None:
    path = make_npz(tmp_path / "x.npz", classes=np.array(["a", "b", Attack()], dtype=object))
    with pytest.raises(UserError, match=r"classes are refused: .*system.*; save them again as an array of strings"):
        load_data(str(path))
    path = make_npz(tmp_path / "x.npz", train_labels=np.array([0, 1, 2, 0, 1, 2], dtype=object))
    with pytest.raises(UserError, match=r"train_labels are Python objects.*np\.array\(\.\.\., dtype=np\.int64\)"):
        load_data(str(path))
    assert not Path("/tmp/distill-npz-attack").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "lacks train_images"),
        ({"test_labels": None, "test_images": None}, "lacks test_images, test_labels"),
        (
            {"train_images": np.zeros((6, 3, 32, 32), np.uint8)},
            r"must be uint8 \(N, H, W, 3\), got uint8 \(6, 3, 32, 32\)",
        ),
        (
            {"train_images": np.zeros((6, 28, 28), np.float32)},
            r"\(N, H, W, 3\) or, in an .npz file, \(N, H, W\), got float32 \(6, 28, 28\); floats from 0 to 1: \(255",
        ),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.zeros(0, int)}, "got uint8"),
        ({"train_labels": np.zeros(5, int)}, r"one for each of the 6 images, got int64 \(5,\)"),
        ({"train_labels": np.zeros(6)}, "must be integers"),
        ({"train_labels": np.array([-1, 0, 0, 0, 0, 0])}, "must be integers from 0 on"),
        ({"classes": np.array(["a", "b"])}, "2 classes, labels up to 2"),
        ({"train_labels": np.zeros(6, int), "test_labels": np.zeros(3, int)}, "1 classes"),
        ({"test_labels": np.array([0, 1, 3])}, "class 3 is in test_labels but not in train_labels"),
        ({"train_labels": np.zeros((6, 14), int)}, r"one for each of the 6 images, got int64 \(6, 14\)"),
        ({"classes": np.array(3)}, "classes is no list of names"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, 10**10])}, "labels up to 10000000000 for 6 images"),
        ({"classes": np.array(["a", "b", {"c": 1}], dtype=object)}, "classes is no list of names"),
    ],
)
def test_wrong_npz(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_data(str(make_npz(tmp_path / "x.npz", **changes)))
    assert str(tmp_path / "x.npz") in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_truncated_npz(tmp_path: Path, keep: int) -> None:
    path = make_npz(tmp_path / "x.npz")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged"):
        load_data(str(path))


def test_flipped_bits_in_a_compressed_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    arrays = dict(np.load(make_npz(path)))
    np.savez_compressed(path, **arrays)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            data = load_data(str(path))
        except UserError:
            continue
        assert torch.equal(data.train_labels, torch.from_numpy(arrays["train_labels"]))  # a bit that means nothing
        assert not data.train_images.any()


# ------------------------------------------------------------------------------------------------------------- folders
def test_folder_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "my pets ü", ("a cat", "dög"))
    monkeypatch.setattr(folder, "AT_ONCE", 4)
    first = load_data(str(root))
    assert (first.name, first.classes) == ("my pets ü", ("a cat", "dög"))
    assert first.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(root / "train" / "dög" / "001.png"))
    assert np.array_equal(first.train_images[4].numpy(), expected)
    decode = folder._decode
    monkeypatch.setattr(folder, "_decode", lambda *_: pytest.fail("decoded again"))
    assert load_data(str(root)).digest == first.digest
    monkeypatch.setattr(folder, "_decode", decode)
    Image.fromarray(255 - expected).save(root / "train" / "dög" / "001.png")
    assert load_data(str(root)).digest != first.digest


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "pets", count=100)
    digests = set()
    for workers in (0, 1, 4):
        monkeypatch.setattr(folder, "CHECKPOINTS", tmp_path / str(workers))
        digests.add(load_data(str(root), workers=workers).digest)
    assert len(digests) == 1


def test_damaged_cache_is_named_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder, "CHECKPOINTS", tmp_path / "cache of test")
    root = make_folder(tmp_path / "pets")
    digest = load_data(str(root)).digest
    (cache,) = (tmp_path / "cache of test" / "cache").iterdir()
    cache.write_bytes(b"damaged")
    assert load_data(str(root)).digest == digest
    assert "decoding again" in capsys.readouterr().out


def test_passes_by_what_is_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "pets")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "README.txt").write_text("x")
    (root / "train" / "cat" / ".DS_Store").write_text("x")
    (root / "train" / "cat" / "Thumbs.db").write_text("x")
    assert len(load_data(str(root)).train_images) == 6
    assert "note: 1 files in" in capsys.readouterr().out


def test_resizing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_data(str(make_folder(tmp_path / "pets", size=50))).train_images.shape == (6, 32, 32, 3)
    assert "train: 6 of 6 images are resized to 32x32" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    root = make_folder(tmp_path / "pets")
    grey = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
    file = root / "train" / "cat" / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(file)
    found = load_data(str(root)).train_images[3].numpy()
    expected = Image.fromarray(grey) if mode == "I;16" else Image.open(file)
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def text(file: Path) -> None:
    file.write_text("not an image")


def enormous(file: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(file)


def broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [truncated, empty, text, enormous, broken_link], ids=lambda d: d.__name__)
def test_broken_images_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    root = make_folder(tmp_path / "pets")
    damage(root / "train" / "dog" / "002.png")
    with pytest.raises(UserError, match=r"train/dog/002\.png") as error:
        load_data(str(root))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("home")
def test_skip_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "pets", count=20)
    text(root / "train" / "cat" / "007.png")
    data = load_data(str(root), skip_bad_images=True)
    assert len(data.train_images) == len(data.train_labels) == 39
    assert data.train_labels.bincount().tolist() == [19, 20]
    assert "left out" in capsys.readouterr().out
    opening = folder.open_image

    def hiccup(file: str, largest: int) -> Any:
        if file.endswith("dog/003.png"):
            raise BrokenImage({file: "Input/output error"})
        return opening(file, largest)

    (root / "train" / "cat" / "007.png").unlink()
    monkeypatch.setattr(folder, "open_image", hiccup)
    assert len(load_data(str(root), skip_bad_images=True).train_images) == 38
    monkeypatch.undo()
    assert len(load_data(str(root), skip_bad_images=True).train_images) == 39  # the disk is well again
    text(root / "train" / "cat" / "007.png")
    text(root / "train" / "dog" / "007.png")
    with pytest.raises(UserError, match=r"up to 0\.1 % of them, or one"):
        load_data(str(root), skip_bad_images=True)


def remove_class(root: Path) -> None:
    for file in (root / "test" / "dog").iterdir():
        file.unlink()
    (root / "test" / "dog").rmdir()


def empty_class(root: Path) -> None:
    for file in (root / "train" / "dog").iterdir():
        file.unlink()


def no_test(root: Path) -> None:
    os.rename(root / "test", root / "val")


def no_classes(root: Path) -> None:
    os.rename(root / "test", root / "old")
    (root / "test").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_class, "class 'dog' of .*train is not in .*test"),
        (empty_class, "class 'dog' in .*train has no images"),
        (no_test, "has no directory 'test'"),
        (no_classes, "has no class folders"),
    ],
)
def test_wrong_folders(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    root = make_folder(tmp_path / "pets")
    change(root)
    with pytest.raises(UserError, match=message):
        load_data(str(root))


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 classes"):
        load_data(str(make_folder(tmp_path / "pets", ("cat",))))
