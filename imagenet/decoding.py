"""Photos from files: the part of one that is asked for, at the size that is asked for.

Decoders agree to the bit or nearly, but which one decodes is part of what a view is. All of them are well-kept
libraries: torchvision.io and simplejpeg are libjpeg-turbo, Pillow reads every format.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from distill.data.pixels import is_dim, is_turned, open_image, to_rgb
from distill.errors import UserError

LARGEST = 64_000_000  # pixels of a file, or of it resized; more is a mistake or a decompression bomb

Result = TypeVar("Result")


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def read_box(file: str, box_of: Callable[[int, int], Box], size: int, decoder: str) -> Tensor:
    """Returns the part `box_of(height, width)` of a photo, resized to `size` x `size`, as uint8 (3, size, size).

    It is resized bilinearly with antialiasing.
    """

    def part(image: Image.Image, content: bytes) -> Tensor:
        height, width = image.height, image.width
        top, left, tall, wide = box_of(height, width)
        factor = max(k for k in (1, 2, 4, 8) if k == 1 or min(tall, wide) >= k * size)
        pixels = _decode(image, content, decoder, factor)
        y, x = pixels.shape[1] / height, pixels.shape[2] / width
        rows = slice(round(top * y), max(round((top + tall) * y), round(top * y) + 1))
        columns = slice(round(left * x), max(round((left + wide) * x), round(left * x) + 1))
        return resize(pixels[:, rows, columns], (size, size), "bilinear")

    return _open(file, part)


def read_centre(file: str, resized: int, size: int, interpolation: str, decoder: str) -> Tensor:
    """The short side resized to `resized` pixels, then the `size` x `size` centre: uint8 (3, size, size).

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop do. Raises BrokenImage.
    """
    return _open(file, lambda image, content: _centre(image, content, resized, size, interpolation, decoder))


def examine(file: str, decoder: str) -> tuple[bool, bool]:
    """Decodes the whole photo: (EXIF would turn it, it has 16 bits and is nearly black). Raises BrokenImage."""

    def look(image: Image.Image, content: bytes) -> tuple[bool, bool]:
        _centre(image, content, 32, 32, "bilinear", decoder)
        return is_turned(image), is_dim(image)

    return _open(file, look)


def _centre(image: Image.Image, content: bytes, resized: int, size: int, interpolation: str, decoder: str) -> Tensor:
    pixels = _decode(image, content, decoder, 1)
    height, width = pixels.shape[1:]
    short = min(height, width)
    shape = (int(resized * height / short), int(resized * width / short))
    if shape[0] * shape[1] > LARGEST:
        raise ValueError(f"{width}x{height} pixels, too thin to be resized to {resized} on the short side")
    found = resize(pixels, shape, interpolation)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return found[:, top : top + size, left : left + size]


def resize(pixels: Tensor, shape: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, *shape), with antialiasing."""
    return F.interpolate(pixels.unsqueeze(0), shape, mode=interpolation, antialias=True).squeeze(0)


def _open(file: str, work: Callable[[Image.Image, bytes], Result]) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, which are refused here, and of odd metadata
        with open_image(file, LARGEST) as (image, content):
            return work(image, content)


def _decode(image: Image.Image, content: bytes, decoder: str, factor: int) -> Tensor:
    """uint8 (3, H, W), RGB."""
    library = simplejpeg() if decoder == "simplejpeg" else None
    plain = image.format == "JPEG" and image.mode in ("RGB", "L")
    if plain and factor == 1 and decoder != "pillow":
        try:
            if library:
                return _channels_first(library.decode_jpeg(content, "RGB"))
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except (RuntimeError, ValueError):
            pass  # Pillow reads some files that others refuse, and says what is wrong with the rest
    if plain and factor > 1:
        image.draft("RGB", (image.width // factor, image.height // factor))
    return _channels_first(np.array(to_rgb(image)))


def _channels_first(pixels: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def simplejpeg() -> Any:
    """The package. Raises UserError if it is absent."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        raise UserError("--decoder simplejpeg needs the package simplejpeg: pip install simplejpeg") from None
