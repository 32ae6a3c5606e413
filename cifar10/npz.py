""".npz files of small images: as arrays of the one form that data.py takes, without unpickling anything."""

from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from cifar10.official import ArrayUnpickler
from distill.errors import UserError

REQUIRED = tuple(f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels"))


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays REQUIRED, and `classes` if they are named. Raises UserError.

    Labels (N, 1) become (N,), grey images (N, H, W) and (N, H, W, 1) become (N, H, W, 3); class names may be bytes or
    Python objects.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in REQUIRED if key not in archive]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(REQUIRED)}")
            if unused := sorted(set(archive) - {*REQUIRED, "classes"}):
                print(f"note: {', '.join(unused)} of {path} are not used")
            arrays = {key: _array(archive, key, path) for key in REQUIRED}
            if "classes" in archive:
                arrays["classes"] = _names(archive, path)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything on damaged input
        raise UserError(f"{path} is damaged or no .npz file of plain arrays ({type(error).__name__})") from None
    return arrays


def _array(archive: NpzFile, key: str, path: Path) -> NDArray[Any]:
    if _is_objects(archive, key):
        raise UserError(
            f"{path}: {key} are Python objects, which are not unpickled: save them again as an array of numbers, "
            f"np.stack or np.array(..., dtype={'np.uint8' if key.endswith('images') else 'np.int64'})"
        )
    values: NDArray[Any] = archive[key]
    if key.endswith("labels"):
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.dtype != np.uint8 or not values.size:
        return values
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim == 4 and values.shape[3] == 1:
        return np.repeat(values, 3, axis=3)
    return values


def _names(archive: NpzFile, path: Path) -> NDArray[Any]:
    """The class names as strings. Objects are read by an unpickler that knows nothing but arrays and plain values."""
    if _is_objects(archive, "classes"):
        with _member(archive, "classes") as file:
            _header(file)
            named = np.asarray(_unpickle(file, path), dtype=object)
    else:
        named = np.asarray(archive["classes"])
    if named.ndim != 1 or not all(isinstance(name, (str, bytes, int, np.generic)) for name in named):
        raise UserError(f"{path}: classes is no list of names: save np.array([...]) of strings, one for each class")
    return np.array([name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in named])


def _unpickle(file: IO[bytes], path: Path) -> Any:
    try:
        return ArrayUnpickler(file).load()
    except UnpicklingError as error:
        raise UserError(f"{path}: classes are refused: {error}; save them again as an array of strings") from None


def _is_objects(archive: NpzFile, key: str) -> bool:
    with _member(archive, key) as file:
        return bool(_header(file).hasobject)


def _member(archive: NpzFile, key: str) -> IO[bytes]:
    assert archive.zip
    return archive.zip.open(f"{key}.npy")


def _header(file: IO[bytes]) -> np.dtype[Any]:
    """The type of the array whose header is read from `file`."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    return read[npy.read_magic(file)](file)[2]
