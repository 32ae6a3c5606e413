"""Image files to RGB of 8 bits: one rule for small images and photos, for training, evaluation and teachers alike.

Transparency is laid over white, as a page shows it and as image processors of published models do; what lies under
transparent pixels is not part of the picture. 16 bits are scaled to 8, floats are 0 to 1, int32 are 0 to 255. EXIF
orientation is ignored, as torchvision's ImageFolder ignores it.
"""

import errno
import io
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.errors import BrokenImage, out_of_memory, too_many_files

ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
DIM = 4096  # the largest value of 12 bits is below: in a file of 16 that is nearly black
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
PAUSES = (0.1, 1.0)  # seconds before a read is tried again
FIRST = 1000  # files of which it is said how many EXIF would turn


@contextmanager
def open_image(file: str, largest: int) -> Iterator[tuple[Image.Image, bytes]]:
    """The image, of which the header is read, and the content of its file.

    Raises BrokenImage for a file that cannot be read, for more than `largest` pixels, and for anything that goes wrong
    with it while it is open.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # reading a FIFO would wait for ever
            raise ValueError("not a regular file")
        content = _read(file)
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > largest:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {largest:,}")
            yield image, content
    except Exception as error:  # decoders raise nearly anything on damaged input
        if too_many_files(error) or out_of_memory(error):  # nothing is wrong with this one
            raise
        reason = re.sub(r":? ?(<_io\.BytesIO object[^>]*>|'[^']*/[^']*')$", "", " ".join(str(error).split()))
        raise BrokenImage({file: f"{type(error).__name__}: {reason[:120]}"}) from None


def _read(file: str) -> bytes:
    """Returns the content of a file; where a disk of the network fails for a moment it is asked again."""
    for pause in PAUSES:
        try:
            return Path(file).read_bytes()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return Path(file).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image as RGB, 8 bits a channel, of the same size, whatever Pillow's mode is.

    Raises ValueError for numbers without a known range.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if _may_be_transparent(image):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the picture is to be turned or mirrored when it is shown."""
    try:
        return image.getexif().get(ORIENTATION) in range(2, 9)
    except Exception:  # damaged metadata do no harm to pixels
        return False


def count_turned(files: Sequence[str]) -> int:
    """Returns how many of the files EXIF would turn, as far as Pillow reads them."""
    turned = 0
    for file in files:
        with suppress(Exception), Image.open(file) as image:  # which errors there are is told where pixels are read
            turned += is_turned(image)
    return turned


def is_dim(image: Image.Image) -> bool:
    """Whether the file has 16 bits and no value from 4096 on: fewer bits, probably, which were not scaled."""
    return _scale(image) == 1 << 16 and int(np.asarray(image).max()) < DIM


def say_turned(turned: int, looked_at: int, what: str = "training files", to: TextIO | None = None) -> None:
    """Prints how many of the first files EXIF would turn, if any, to standard output or to `to`."""
    if turned:
        print(
            f"note: {turned} of the first {looked_at} {what} carry an EXIF orientation, which is ignored: "
            "`mogrify -auto-orient FILES` (ImageMagick) turns them",
            file=to,
        )


def say_dim(files: Sequence[str]) -> None:
    """Prints a line for files of 16 bits that are nearly black, if there are any."""
    if files:
        others = f" and {len(files) - 1} others" if len(files) > 1 else ""
        print(f"note: {files[0]}{others}: 16 bits, but no value from {DIM} on, so nearly black; scale 12 bits to 16")


def _may_be_transparent(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return image.mode in ("LA", "PA", "RGBA", "RGBa") or palette.endswith("A") or "transparency" in image.info


def _scale(image: Image.Image) -> int:
    """How many levels of grey the numbers of an image have; 0 for channels of 8 bits, which Pillow converts itself."""
    if image.mode.startswith("I;16"):
        return 1 << min(16, _tag(image, BITS, 16))
    if image.mode == "I":  # of 32 bits but for formats of 16, which some versions of Pillow open so
        return 1 << 16 if image.format in ("PNG", "PPM", "JPEG2000") else 1 << 8
    return 0


def _tag(image: Image.Image, number: int, default: int) -> int:
    value = getattr(image, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W) of an image whose pixels are numbers of more than 8 bits."""
    values: NDArray[Any] = np.asarray(image)
    if image.mode == "F":
        values = _inside(values, 1, "float") * 255
        grey = np.rint(values).astype(np.uint8)
    else:
        levels = _scale(image)
        grey = (_inside(values, levels - 1, "integer") // (levels >> 8)).astype(np.uint8)
    if _tag(image, PHOTOMETRIC, 1) == 0:  # of TIFF: zero is white, which Pillow knows for 8 bits
        grey = 255 - grey
    if isinstance(hidden := image.info.get("transparency"), int):
        grey[values == hidden] = 255
    return grey


def _inside(values: NDArray[Any], most: int, kind: str) -> NDArray[Any]:
    """`values`. Raises ValueError unless all of them are from 0 to `most`."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # nor NaN
        raise ValueError(f"{kind} pixels from {low:g} to {high:g}, must be 0 to {most}: save it with 8 or 16 bits")
    return values
