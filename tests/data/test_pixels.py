"""Image files of every mode become RGB by one rule, for small images and photos; or are refused with the reason."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from cifar10 import folder
from distill.data import pixels
from distill.data.pixels import is_dim, is_turned, open_image, say_dim, say_turned
from distill.errors import BrokenImage
from imagenet.decoding import Box, examine, read_box, read_centre
from tests.conftest import ROOT

GREY = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
HIDDEN = np.full((32, 32), 200, np.uint8)  # the colour that transparent pixels have in the file
ALPHA = np.where(np.arange(32) < 16, 255, 0).astype(np.uint8) * np.ones((32, 1), np.uint8)
LEFT_ON_WHITE = np.where(ALPHA == 255, GREY, 255).astype(np.uint8)


def stacked(*channels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def rgba(alpha: NDArray[Any] = ALPHA) -> Image.Image:
    covered = np.where(ALPHA == 255, GREY, HIDDEN)
    return stacked(covered, covered, covered, alpha)


def with_tags(values: NDArray[Any], **tags: int) -> Callable[[Path], None]:
    """Save as TIFF with tags that Pillow would choose otherwise."""

    def save(file: Path) -> None:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for name, value in tags.items():
            info[getattr(TiffImagePlugin, name)] = value
        Image.fromarray(values).save(file, tiffinfo=info)

    return save


def saved(image: Image.Image, **settings: Any) -> Callable[[Path], None]:
    return lambda file: image.save(file, **settings)


def twelve_bits(file: Path) -> None:
    """A TIFF of 12 bits a pixel, two pixels in three bytes, which Pillow does not write."""
    values = (GREY.astype(np.uint16) << 4).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], -1)
    entries = [(256, 3, 32), (257, 3, 32), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1)]
    entries += [(278, 3, 32), (279, 4, packed.size)]
    header = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, kind, value in entries:
        header += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
        header += value.to_bytes(4, "little")
    file.write_bytes(header + bytes(122 - len(header)) + packed.astype(np.uint8).tobytes())


def pgm(most: int) -> Callable[[Path], None]:
    values = np.rint(GREY / 255 * most).astype(">u2" if most > 255 else "u1")
    return lambda file: file.write_bytes(b"P5 32 32 %d\n" % most + values.tobytes()) and None


def minimum_is_white(file: Path) -> None:
    with_tags((65535 - GREY * np.uint16(257)), PHOTOMETRIC_INTERPRETATION=1)(file)
    content = file.read_bytes()
    tag = (262).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert content.count(tag + b"\1") == 1
    file.write_bytes(content.replace(tag + b"\1", tag + b"\0"))


RIGHT: dict[str, tuple[Callable[[Path], None], NDArray[np.uint8]]] = {
    "grey.png": (saved(Image.fromarray(GREY)), GREY),
    "bits.png": (saved(Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)), np.where(GREY >= 128, 255, 0)),
    "palette.png": (saved(Image.fromarray(GREY).convert("P")), GREY),
    "cmyk.tif": (saved(Image.fromarray(GREY).convert("RGB").convert("CMYK")), GREY),
    "16.png": (saved(Image.fromarray(GREY * np.uint16(257))), GREY),
    "16.tiff": (saved(Image.fromarray(GREY * np.uint16(257))), GREY),
    "16big.tif": (saved(Image.fromarray((GREY * np.uint16(257)).astype(">u2"))), GREY),
    "16white.tif": (minimum_is_white, GREY),
    "12.tif": (twelve_bits, GREY),
    "8.pgm": (pgm(255), GREY),
    "12.pgm": (pgm(4095), GREY),
    "16.PGM": (pgm(65535), GREY),
    "int32.tif": (saved(Image.fromarray(GREY.astype(np.int32))), GREY),
    "float.tif": (saved(Image.fromarray((GREY / 255).astype(np.float32))), GREY),
    "rgba.png": (saved(rgba()), LEFT_ON_WHITE),
    "rgba.webp": (saved(rgba(), lossless=True, exact=True), LEFT_ON_WHITE),
    "rgba.tif": (saved(rgba()), LEFT_ON_WHITE),
    "opaque.png": (saved(rgba(np.full_like(GREY, 255))), np.where(ALPHA == 255, GREY, HIDDEN)),
    "half.png": (saved(stacked(GREY, GREY, GREY, GREY * 0 + 128)), np.rint(GREY * (128 / 255) + 127)),
    "la.png": (saved(rgba().convert("LA")), LEFT_ON_WHITE),
    "key.png": (saved(Image.fromarray(GREY).convert("RGB"), transparency=(0, 0, 0)), np.where(GREY == 0, 255, GREY)),
    "greykey.png": (saved(Image.fromarray(GREY), transparency=8), np.where(GREY == 8, 255, GREY)),
    "16key.png": (saved(Image.fromarray(GREY * np.uint16(257)), transparency=2056), np.where(GREY == 8, 255, GREY)),
    "palettekey.png": (saved(Image.fromarray(GREY).convert("P"), transparency=0), np.where(GREY == 0, 255, GREY)),
    "key.gif": (saved(Image.fromarray(GREY).convert("P"), transparency=0), np.where(GREY == 0, 255, GREY)),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "int32.tif": (saved(Image.fromarray(GREY.astype(np.int32) + 70000)), "integer pixels from 70000 to 70248, must be"),
    "negative.tif": (saved(Image.fromarray(GREY.astype(np.int32) - 5)), "integer pixels from -5 to 243, must be"),
    "float.tif": (saved(Image.fromarray(GREY.astype(np.float32))), "float pixels from 0 to 248, must be 0 to 1"),
    "nan.tif": (saved(Image.fromarray(np.full((32, 32), np.nan, np.float32))), "float pixels from nan to nan"),
}


def readings(file: Path) -> list[NDArray[np.uint8]]:
    """The pixels as each user of files sees them: small images, evaluation and training on photos."""
    small = folder._decode_file(str(file))
    if isinstance(small, BrokenImage):
        raise small
    found = [small.pixels]
    for decoder in ("torchvision", "pillow"):
        centre = read_centre(str(file), 32, 32, "bilinear", decoder)
        box = read_box(str(file), lambda height, width: Box(0, 0, height, width), 32, decoder)
        found += [centre.permute(1, 2, 0).numpy(), box.permute(1, 2, 0).numpy()]
    return found


@pytest.mark.parametrize("name", RIGHT)
def test_every_mode_is_right_everywhere(name: str, tmp_path: Path) -> None:
    save, expected = RIGHT[name]
    save(tmp_path / name)
    for found in readings(tmp_path / name):
        assert np.abs(found.astype(int) - np.asarray(expected).astype(int)[..., None]).max() <= (name[:4] == "half")


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_without_a_known_range_are_refused(name: str, tmp_path: Path) -> None:
    save, message = REFUSED[name]
    save(tmp_path / name)
    reads = (folder._decode_file, lambda file: read_centre(file, 32, 32, "bilinear", "pillow"))
    for read in reads:
        try:
            found: Any = read(str(tmp_path / name))
        except BrokenImage as error:
            found = error
        assert f"cannot decode {tmp_path / name}: ValueError: {message}" in str(found)


def test_what_is_odd_about_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(GREY.astype(np.uint16) << 4).save(tmp_path / "dim.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(GREY).save(tmp_path / "turned.jpg", exif=turned)
    turned[0x0112] = 1
    Image.fromarray(GREY).save(tmp_path / "upright.jpg", exif=turned)
    twelve_bits(tmp_path / "12.tif")
    RIGHT["16.png"][0](tmp_path / "16.png")
    odd = {"dim.png": (False, True), "turned.jpg": (True, False)}
    for file in tmp_path.iterdir():
        with open_image(str(file), 10_000) as (image, _):
            assert (is_turned(image), is_dim(image)) == odd.get(file.name, (False, False))
        assert examine(str(file), "torchvision") == odd.get(file.name, (False, False))
    say_turned(0, 10)
    say_dim([])
    assert capsys.readouterr().out == ""
    say_turned(3, 10)
    say_dim(["a.png", "b.png"])
    said = capsys.readouterr().out
    assert "3 of the first 10 training files carry an EXIF orientation, which is ignored" in said
    assert "a.png and 1 others: 16 bits, but no value from 4096 on" in said


def test_orientation_is_ignored(tmp_path: Path) -> None:
    for name in ("plain.jpg", "turned.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned.jpg" else 1
        Image.fromarray(GREY).save(tmp_path / name, exif=exif)
    for one, other in zip(readings(tmp_path / "plain.jpg"), readings(tmp_path / "turned.jpg"), strict=True):
        assert np.array_equal(one, other)


def test_a_small_folder_says_what_is_odd(tmp_path: Path) -> None:
    """Called as a user does; the dim file, the turned ones and the transparent one are in both splits."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            where = tmp_path / "pets" / split / name
            where.mkdir(parents=True)
            rgba().save(where / "a.png")
            Image.fromarray(GREY).save(where / "b.jpg", exif=exif)
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "pets" / "train" / "dog" / "c.png")
    code = f"from cifar10.data import load_data; print(load_data({str(tmp_path / 'pets')!r}).train_images[0, 0, 31])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "note: 2 of the first 5 training files carry an EXIF orientation, which is ignored" in found
    assert found.count("train/dog/c.png: 16 bits, but no value from 4096 on") == 1
    assert "tensor([255, 255, 255]" in found


def test_a_disk_that_fails_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(GREY).save(file)
    content, errors = file.read_bytes(), [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "no answer")]
    slept: list[float] = []
    monkeypatch.setattr(pixels.time, "sleep", slept.append)

    def read(_: Path) -> bytes:
        if errors:
            raise errors.pop()
        return content

    monkeypatch.setattr(Path, "read_bytes", read)
    with open_image(str(file), 10**6) as (image, _):
        assert image.size == (32, 32)
    assert slept == [0.1, 1.0]
    errors += [OSError(errno.EIO, "no answer")] * 3
    with pytest.raises(BrokenImage, match="no answer"), open_image(str(file), 10**6):
        pass
    lacking = (MemoryError(), OSError(errno.ENOMEM, "no"), RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    for error in lacking:
        errors[:] = [error]  # type: ignore[list-item]
        with pytest.raises(type(error)) as raised, open_image(str(file), 10**6):
            pass
        assert raised.value is error


def test_a_pipe_named_like_an_image_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BrokenImage, match="not a regular file"), open_image(str(tmp_path / "pipe.png"), 100):
        pass
