"""How a file of others is read: never trusted, and nothing in it is executed.

Kind, size, checksums and content are verified before any of it is used. torch.load(weights_only=True) is the only way;
what it builds beside tensors and plain values are the stand-ins of stand_ins.py.
"""

import errno
import mmap
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.errors import CannotReadError, CheckpointError, out_of_memory
from distill.files import stand_ins as inert

EXPANDING = (b"_codecs\nencode\n", b"bytearray\n")  # what a pickle might fill the memory with
FULL = "its pickle might fill the memory: it calls bytearray, or _codecs.encode for something else than bytes"
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what files of torch.save from before 1.6 begin with
NEVER = (  # modules of which no trainer keeps anything beside weights; commands is subprocess's name of before
    *("os", "posix", "nt", "sys", "subprocess", "commands", "importlib", "runpy", "pickle", "socket", "shutil"),
    *("ctypes", "pty"),
)


def read(path: Path) -> Any:
    """What torch.save or safetensors wrote in a file, on the CPU. Raises CheckpointError, executes nothing."""
    size = _check_kind(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(inert.STAND_INS):
            warnings.simplefilter("ignore")  # torch warns of unusual pickles that it then refuses or reads
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(_refusal(path, refused[1])) from None
        raise CheckpointError(_unreadable(path)) from None
    except (RuntimeError, ValueError, KeyError, EOFError, TypeError, IndexError, AttributeError) as error:
        if out_of_memory(error):
            raise CannotReadError(f"{path} cannot be read (out of memory)") from None
        raise CheckpointError(_unreadable(path)) from None  # torch's text proposes the unsafe way
    except (MemoryError, OSError) as error:
        raise CannotReadError(f"{path} cannot be read ({_brief(error)})") from None
    _check_tensors(path, content, size)
    return content


def _unreadable(path: Path) -> str:
    """What to say of a file that torch cannot read."""
    with open(path, "rb") as file:
        head = file.read(len(OLD))
    if head[:1] != OLD[:1] or head == OLD:
        return f"{path} is damaged or no checkpoint"
    saved = _resaved(path, "__import__('pickle').loads(__import__('pathlib').Path({}).read_bytes())")
    return f"{path} is no file of torch.save, but a plain pickle, or damaged; if it is one, and you trust it: {saved}"


def _refusal(path: Path, name: str) -> str:
    """Why a file that asks for the type or function `name` is not read, and how its weights come out of it."""
    if name.split(".")[0] in NEVER or "." not in name:  # torch says `eval` for builtins.eval
        return f"{path} refused: it asks for {name}, which is no plain weight and does not belong into such a file"
    where = "where it was made, and if you trust it"
    if _is_whole_module(path, name):
        saved = _resaved(path, "torch.load({}, 'cpu', weights_only=False).state_dict()")
        return f"{path} refused: it is a whole pickled module ({name}), not weights alone; {where}: {saved}"
    saved = _resaved(
        path, "getattr(c := torch.load({}, 'cpu', weights_only=False), 'state_dict', lambda: c['state_dict'])()"
    )
    return (
        f"{path} refused: it asks for {name}, which is no plain weight; {where}, this re-saves the weights (with the "
        f"key that they are under): {saved}"
    )


def _resaved(path: Path, loaded: str) -> str:
    name = str(path)
    return f'python -c "import torch; torch.save({loaded.format(repr(name))}, {path.stem + "-weights.pt"!r})"'


def _is_whole_module(path: Path, name: str) -> bool:
    """Whether the first thing in a file's pickle is the class `name`: then all of it is one object of that class."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive, archive.open(_pickle_in(archive)) as file:
        start = file.read(500)
    return start[2:].startswith("c{}\n{}\n".format(*name.rpartition(".")[::2]).encode())


def _pickle_in(archive: zipfile.ZipFile) -> str:
    """The name of the pickle in an archive by torch.save. Raises KeyError."""
    names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if not names:
        raise KeyError("data.pkl")
    return names[0]


def _check_kind(path: Path) -> int:
    """The size of a regular, readable, plausible file; zip archives with matching checksums."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            raise CheckpointError(f"{path} is not a file")
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as error:
        raise CannotReadError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a checkpoint; download the file itself")
    if head.startswith(b"PK"):
        _check_zip(path, status.st_size)
    elif path.suffix != ".safetensors":
        _check_old(path)
    return status.st_size


def _check_zip(path: Path, size: int) -> None:
    """A plain torch.load does not compare checksums: a flipped bit would load silently."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_program(path, archive)  # parts of a program are compressed
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise CheckpointError(f"{path} refused: compressed archives are not read")
            broken = archive.testzip()
            _check_pickles(path, archive)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # that one is of a wrong offset
            raise CannotReadError(f"cannot read {path}: {error.strerror}") from None
        raise CheckpointError(f"{path} is damaged or cut short ({_brief(error)})") from None
    if broken:
        raise CheckpointError(f"{path} is damaged: wrong checksum of {broken}")


def _check_program(path: Path, archive: zipfile.ZipFile) -> None:
    """An archive by torch.jit.save is a program."""
    if any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist()):
        saved = _resaved(path, "torch.jit.load({}, 'cpu').state_dict()")
        raise CheckpointError(f"{path} is a TorchScript program, not weights alone; if you trust it: {saved}")


def _check_pickles(path: Path, archive: zipfile.ZipFile) -> None:
    """A pickle of torch.save must not be one that fills the memory."""
    for name in archive.namelist():
        pickled = archive.read(name) if name.endswith(".pkl") else b""
        if any(call in pickled for call in EXPANDING) and inert.expands(pickled):
            raise CheckpointError(f"{path} refused: {FULL}")


def _check_old(path: Path) -> None:
    """The same for a file of before torch 1.6: a row of pickles, and the numbers of the tensors after them."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        last = max(map(content.rfind, EXPANDING))
        try:
            while last >= 0 and file.tell() <= last:
                if inert.expands(file):
                    raise CheckpointError(f"{path} refused: {FULL}")
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(_unreadable(path)) from None


def _check_tensors(path: Path, content: Any, size: int) -> None:
    """No tensor is larger than the file it came from, and nothing is nested without end: nothing expands later."""
    level, depth = [content], 0
    while level:
        deeper: list[Any] = []
        for value in level:
            _check_size(path, value, size)
            if isinstance(value, Mapping):
                deeper += value.values()
            elif isinstance(value, (list, tuple)):
                deeper += value
        level, depth = deeper, depth + 1
        # Lists that hold one another multiply from level to level, or never end.
        if depth > 50 or len(level) > max(size, 1000):
            raise CheckpointError(f"{path} refused: its content is nested {depth} deep with {len(level)} entries")


def _check_size(path: Path, value: Any, size: int) -> None:
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.numel() * value.element_size() > size:
            raise CheckpointError(
                f"{path} refused: it claims a tensor {tuple(value.shape)}, more than its {size} bytes"
            )


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # its own error class is not importable on every version
        raise CheckpointError(f"{path} is damaged or no safetensors file ({_brief(error)})") from None


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
