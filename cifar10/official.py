"""CIFAR-10 as its authors publish it: download, verify, and read without running anything that is in it.

The archive is read in place: known members by name, nothing is extracted, and the unpickler builds numpy arrays only.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html. Digest of the archive: sha256 below (its
published md5 is c58f30108f718f92721af3b95e74349a).
"""

import errno
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill import downloads
from distill.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
FOLDER = "cifar-10-batches-py"
BATCHES = {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)}
NAMES = "batches.meta"
LARGEST = 100_000_000  # bytes of one batch; the published ones have 31 million

# What a pickled numpy array of bytes consists of, under the names that old and new versions of numpy give it.
ARRAY_PIECES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """Builds plain values and numpy arrays; anything else in the pickle raises UnpicklingError with its name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_PIECES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no piece of an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def is_official(path: Path) -> bool:
    """Whether the directory holds the archive, its unpacked folder, or is that folder."""
    return any((path / name).exists() for name in (ARCHIVE, FOLDER, BATCHES["train"][0]))


def is_begun(directory: Path) -> bool:
    """Whether the directory holds anything but what a download that was cut leaves behind."""
    return directory.is_dir() and any(not entry.name.endswith(".partial") for entry in directory.iterdir())


def read_official(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file of images, from the archive in the directory or from its unpacked batches.

    Raises UserError for a wrong digest, a missing batch, and anything in a batch that is no array of images.
    """
    archive = path / ARCHIVE
    if archive.exists():
        return _assemble(_read_archive(archive), str(archive))
    folder = path / FOLDER if (path / FOLDER).exists() else path
    return _assemble(lambda name: _read_file(folder / name), str(folder))


def _read_archive(archive: Path) -> Callable[[str], bytes]:
    try:
        with open(archive, "rb") as file:
            found = downloads.sha256_of(file)
    except OSError as error:
        raise UserError(f"cannot read {archive}: {error.strerror}") from None
    if found != SHA256:
        raise UserError(f"{archive} has sha256 {found} instead of {SHA256}: cut short or another file; fetch it again")
    contents: dict[str, bytes] = {}
    wanted = {f"{FOLDER}/{name}" for names in (*BATCHES.values(), (NAMES,)) for name in names}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:  # in the order of the file: seeking back would decompress it again
                if member.name in wanted and member.size > LARGEST:
                    raise UserError(f"{archive}: {member.name} has {member.size:,} bytes, too many for a batch")
                if member.name in wanted and member.isreg():
                    stream = tar.extractfile(member)
                    contents[Path(member.name).name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error})") from None

    def read(name: str) -> bytes:
        if name not in contents:
            raise UserError(f"{archive} has no {FOLDER}/{name}")
        return contents[name]

    return read


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UserError(f"{path} is missing, no file, or too large for a batch of CIFAR-10")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _assemble(read: Callable[[str], bytes], source: str) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for split, names in BATCHES.items():
        batches = [_unpickle(read(name), f"{source}: {name}") for name in names]
        images = [_images(batch, f"{source}: {name}") for batch, name in zip(batches, names, strict=True)]
        labels = [np.asarray(batch[b"labels"], dtype=np.int64) for batch in batches]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = np.concatenate(images), np.concatenate(labels)
    named = _unpickle(read(NAMES), f"{source}: {NAMES}").get(b"label_names")
    if not isinstance(named, list) or not all(isinstance(name, bytes) for name in named):
        raise UserError(f"{source}: {NAMES} does not name the classes")
    return {**arrays, "classes": np.array([name.decode(errors="replace") for name in named])}


def _unpickle(content: bytes, source: str) -> dict[bytes, Any]:
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{source} is refused or damaged: {error}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{source} is damaged ({type(error).__name__})") from None
    if not isinstance(batch, dict):
        raise UserError(f"{source} is no batch of CIFAR-10")
    return batch


def _images(batch: dict[bytes, Any], source: str) -> NDArray[np.uint8]:
    """(N, 32, 32, 3) from rows of 3072 bytes: all red values, then green, then blue."""
    rows, labels = np.asarray(batch.get(b"data")), batch.get(b"labels")
    fits = rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == 3072
    if not fits or not isinstance(labels, list) or len(labels) != len(rows) or set(map(type, labels)) - {int}:
        raise UserError(f"{source} does not hold rows of 3072 bytes with a label each")
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def download(directory: Path) -> None:
    """Fetch the archive into `directory`, verified by sha256. Raises UserError that says which file to put where."""
    elsewhere = f"put {ARCHIVE} from {URL} into a directory of yours and name that by --data, or try --data sample"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "it cannot be written to")
    except OSError as error:
        raise UserError(f"CIFAR-10 is not in {directory} ({error.strerror}): {elsewhere}") from None
    downloads.fetch("CIFAR-10", URL, directory / ARCHIVE, SHA256, elsewhere.replace("of yours", f"such as {directory}"))
