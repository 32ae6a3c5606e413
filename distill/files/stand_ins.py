"""Types that others keep beside weights, read as stand-ins that hold nothing which could run.

torch.load(weights_only=True) builds tensors and plain values, and refuses every other type by its name. Those listed in
STAND_INS are read as well, but never as themselves: a stand-in takes any arguments and does nothing with them. Of an
array of numbers it keeps the numbers.
"""

import math
import pickletools
import re
import warnings
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor


class Inert:
    """A value of which nothing is kept."""

    def __init__(self, *_: Any) -> None: ...

    def __new__(cls, *_: Any) -> "Inert":  # noqa: D102 as object has it
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


class NumberType(Inert):
    """Of numpy.dtype its code, such as `f4`, and the order of its bytes."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class Array(Inert):
    """A numpy array: what its pickle says of it."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """Returns the numbers, in the memory that they were read into; None where it holds anything else."""
        try:
            _, shape, kind, by_columns, content = self.state
            if not re.fullmatch(r"[biuf]\d", kind.code) or kind.order not in "=|<":
                return None
            flat = np.frombuffer(content, kind.order + kind.code)
            if math.prod(shape) != flat.size:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the memory is not to be written to, and never is
                return torch.from_numpy(flat.reshape(shape, order="F" if by_columns else "C"))
        except (TypeError, ValueError, AttributeError):
            return None


# Functions, since torch fills only what is exactly a dict or a list.
def _dict(*_: Any) -> dict[Any, Any]:
    return {}


def _list(*_: Any) -> list[Any]:
    return []


def _bytes(*_: Any) -> bytes:
    return b""  # Python pickles no others by this name


PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
NUMBERS = (*(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)), "bool", "bool_")
CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # old and new versions of numpy
NOTHING_KEPT = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion", "numpy.ndarray"),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS),
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "bool", "str", "object", "frozenset")),
    *(f"numpy.{name}" for name in NUMBERS),
    *(f"{core}.scalar" for core in CORES),
    "copyreg._reconstructor",
)
STAND_INS: list[Any] = [
    *((Inert, name) for name in NOTHING_KEPT),
    (NumberType, "numpy.dtype"),
    *((Array, f"{core}._reconstruct") for core in CORES),
    (_dict, "collections.defaultdict"),
    (_list, "collections.deque"),
    (_bytes, "builtins.bytes"),
]
ENCODE = "_codecs encode"  # torch calls it, for bytes


def expands(pickled: bytes | IO[bytes]) -> bool:
    """Whether a pickle calls bytearray, or _codecs.encode for anything but to spell out bytes, as Python does.

    A short pickle would fill the memory: bytearray takes a size, and _codecs.encode, called on its own result with
    `hex` for example, doubles it each time. Raises ValueError for what is no pickle.
    """
    encoders: set[Any] = set()
    latin: set[Any] = set()  # memo numbers of the string `latin1`
    expected: list[str] = []
    pushed = ""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            encoders = encoders | {argument} if pushed == "encoder" else encoders - {argument}
            latin = latin | {argument} if pushed == "latin1" else latin - {argument}
            continue
        fetched = argument if opcode.name in ("BINGET", "LONG_BINGET") else None
        pushed = "latin1" if fetched in latin or argument == "latin1" else opcode.name
        if expected and expected.pop(0) not in (pushed, opcode.name):
            return True
        if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            return True
        if fetched in encoders or (opcode.name == "GLOBAL" and argument == ENCODE):
            pushed, expected = "encoder", ["BINUNICODE", "latin1", "TUPLE2", "REDUCE"]
    return bool(expected)
