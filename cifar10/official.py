"""CIFAR-10 and CIFAR-100 as their authors publish them: download, verify, and read without running what is in them.

The archive is read in place: known members by name, nothing is extracted, and the unpickler builds numpy arrays only.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html. Digests of the archives: sha256 below (their
published md5 are c58f30108f718f92721af3b95e74349a and eb9058c3a382ffc7106e4002c42a8d85).
"""

import errno
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError
from distill.files import downloads


@dataclass(frozen=True)
class Published:
    """A data set of theirs: the archive, and what is in it."""

    name: str
    archive: str
    sha256: str
    folder: str
    train: tuple[str, ...]  # batches
    test: str
    meta: str  # the file with the classes' names
    labels: str  # keys in a batch and in `meta`
    names: str
    url: str

    @property
    def files(self) -> tuple[str, ...]:
        """Returns the names of all its files."""
        return (*self.train, self.test, self.meta)


SITE = "https://www.cs.toronto.edu/~kriz"
CIFAR10 = Published(
    name="CIFAR-10",
    archive="cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{k}" for k in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels="labels",
    names="label_names",
    url=f"{SITE}/cifar-10-python.tar.gz",
)
CIFAR100 = Published(
    name="CIFAR-100",
    archive="cifar-100-python.tar.gz",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
    url=f"{SITE}/cifar-100-python.tar.gz",
)
LARGEST = 200_000_000  # bytes of one batch; the published ones have up to 155 million

# What a pickled numpy array or number consists of; old versions of numpy say numpy.core for numpy._core.
ARRAY_PIECES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """Builds plain values and numpy arrays; anything else in the pickle raises UnpicklingError with its name."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns one of the allowed types. Raises UnpicklingError for any other."""
        today = module.replace("numpy.core", "numpy._core")
        if (today, name) not in ARRAY_PIECES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no piece of an array")
        return _bytes_of if name == "encode" else super().find_class(today, name)


def _bytes_of(text: str, encoding: str) -> bytes:
    """Returns bytes that a pickle spells as a string.

    Raises UnpicklingError for another encoding, which on its own results would fill the memory.
    """
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes by {encoding!r}, which is no piece of an array")
    return text.encode("latin1")


def find_official(path: Path) -> Published | None:
    """Of which data set the directory holds the archive or its unpacked folder, or is that folder, if of any."""
    for published in (CIFAR10, CIFAR100):
        if (path / published.archive).exists() or (path / published.folder).exists():
            return published
        if any((path / name).is_file() for name in published.train):
            return published
    return None


def is_begun(directory: Path) -> bool:
    """Whether the directory holds anything but what a download that was cut leaves behind."""
    return directory.is_dir() and any(not entry.name.endswith(".partial") for entry in directory.iterdir())


def read_official(path: Path, published: Published) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file of images, from the archive in the directory or from its unpacked batches.

    Raises UserError for a wrong digest, a missing batch, and anything in a batch that is no array of images.
    """
    archive = path / published.archive
    if archive.exists():
        return _assemble(published, _read_archive(archive, published), str(archive))
    folder = path / published.folder if (path / published.folder).exists() else path
    return _assemble(published, lambda name: _read_file(folder / name, published), str(folder))


def _read_archive(archive: Path, published: Published) -> Callable[[str], bytes]:
    try:
        with open(archive, "rb") as file:
            actual = downloads.sha256_of(file)
    except OSError as error:
        raise UserError(f"cannot read {archive}: {error.strerror}") from None
    if actual != published.sha256:
        raise UserError(
            f"{archive} has sha256 {actual} instead of {published.sha256}: cut short or another file; fetch it again"
        )
    contents: dict[str, bytes] = {}
    wanted = {f"{published.folder}/{name}" for name in published.files}
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
            raise UserError(f"{archive} has no {published.folder}/{name}")
        return contents[name]

    return read


def _read_file(path: Path, published: Published) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UserError(f"{path} is missing, no file, or too large for a batch of {published.name}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _assemble(published: Published, read: Callable[[str], bytes], source: str) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for split, names in (("train", published.train), ("test", (published.test,))):
        batches = [_unpickle(read(name), f"{source}: {name}", published) for name in names]
        parts = [_batch(batch, published, f"{source}: {name}") for batch, name in zip(batches, names, strict=True)]
        arrays[f"{split}_images"] = np.concatenate([images for images, _ in parts])
        arrays[f"{split}_labels"] = np.concatenate([labels for _, labels in parts])
    named = _unpickle(read(published.meta), f"{source}: {published.meta}", published).get(published.names)
    named = named.tolist() if isinstance(named, np.ndarray) else named
    if not isinstance(named, list) or not all(isinstance(name, (bytes, str)) for name in named):
        raise UserError(f"{source}: {published.meta} does not name the classes")
    return {**arrays, "classes": np.array([_text(name) for name in named])}


def _unpickle(content: bytes, source: str, published: Published) -> dict[str, Any]:
    """A batch by its keys, which are bytes as Python 2 has pickled it, and strings where Python 3 has again."""
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{source} is refused or damaged: {error}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{source} is damaged ({type(error).__name__})") from None
    if not isinstance(batch, dict):
        raise UserError(f"{source} is no batch of {published.name}")
    return {_text(key): value for key, value in batch.items() if isinstance(key, (bytes, str))}


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def _batch(batch: dict[str, Any], published: Published, source: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 32, 32, 3) from rows of 3072 bytes, all red values, then green, then blue; and their labels (N,)."""
    rows, listed = np.asarray(batch.get("data")), batch.get(published.labels)
    fits = rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == 3072
    numbers = isinstance(listed, np.ndarray) or (isinstance(listed, list) and all(map(_is_integer, listed)))
    labels = np.asarray(listed if numbers else [0.5])
    if not fits or labels.dtype.kind not in "iu" or labels.size != len(rows):
        raise UserError(f"{source} does not hold rows of 3072 bytes with a label each")
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.reshape(-1).astype(np.int64)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def download(directory: Path) -> None:
    """Fetch CIFAR-10's archive into `directory`, verified by sha256.

    Raises UserError that says which file to put where.
    """
    elsewhere = f"put {CIFAR10.archive} from {CIFAR10.url} into a directory of yours and name that by --data"
    elsewhere += ", or try --data sample"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "it cannot be written to")
    except OSError as error:
        raise UserError(f"CIFAR-10 is not in {directory} ({error.strerror}): {elsewhere}") from None
    by_hand = elsewhere.replace("of yours", f"such as {directory}")
    downloads.fetch(CIFAR10.name, CIFAR10.url, directory / CIFAR10.archive, CIFAR10.sha256, by_hand)
