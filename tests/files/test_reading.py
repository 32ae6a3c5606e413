"""Files of enemies: refused by name, nothing runs, the memory stays."""

import argparse
import collections
import functools
import os
import pickle
import re
import resource
import runpy
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import CheckpointError
from distill.files import stand_ins as inert
from distill.models.weights import load


class Call:
    """Whatever unpickles it calls `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def within(value: Any) -> argparse.Namespace:
    return argparse.Namespace(lr=0.1, hidden=value)


TOUCH = "touch distill-attack-worked"
ATTACKS = {
    "in a namespace": (within(Call(os.system, TOUCH)), "posix.system"),
    "in an array": (np.array([Call(os.system, TOUCH)], dtype=object), "posix.system"),
    "as a default": (Call(collections.defaultdict, Call(os.system, TOUCH)), "posix.system"),
    "as a path": (Call(Path, Call(subprocess.check_output, TOUCH.split())), "commands.check_output"),
    "eval": (Call(eval, f"__import__('os').system('{TOUCH}')"), "eval"),
    "getattr": (Call(getattr, "text", "upper"), "getattr"),
    "partial": (functools.partial(os.system, TOUCH), "functools.partial"),
    "load": (Call(torch.load, "x.pth"), "torch.serialization.load"),
    "numpy's load": (Call(np.load, "x.npy"), "numpy.load"),
    "a script": (Call(runpy.run_path, "x.py"), "runpy.run_path"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the name of what they ask for, before anything ran."""
    monkeypatch.chdir(tmp_path)
    content, asked_for = ATTACKS[name]
    torch.save({"state_dict": {"w": torch.zeros(2)}, "extra": content}, "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth refused: it asks for {re.escape(asked_for)}"):
        load(Path("x.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def with_pickle(path: Path, code: bytes) -> None:
    """Make `code` the pickle of the file."""
    torch.save({"w": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, code if name.endswith("data.pkl") else content)


# Pieces of pickles: lists whose entries are what _codecs.encode makes of a text, or of what it made before.
GET, LATIN, HEX, CALL = b"c_codecs\nencode\n", b"X\x06\x00\x00\x00latin1", b"X\x03\x00\x00\x00hex", b"\x86R"
TEXT = b"X\x00\x00\x10\x00" + b"a" * 2**20
PUT, FETCH = b"q\x01", b"h\x01"
BOMBS = {
    "doubling": GET + TEXT + LATIN + CALL + PUT + (GET + FETCH + HEX + CALL + PUT) * 40,
    "again": TEXT + PUT + (GET + FETCH + LATIN + CALL) * 4000,
    "renamed": LATIN + PUT + HEX + PUT + GET + TEXT + FETCH + CALL,
    "remembered": GET + PUT + TEXT + LATIN + CALL + FETCH + TEXT + HEX + CALL,
    "unfinished": GET,
    "sized": b"c__builtin__\nbytearray\n" + b"\x8a\x05" + (10**9).to_bytes(5, "little") + b"\x85R",
    "copied": TEXT + LATIN + b"\x86" + PUT + (b"cbuiltins\nbytearray\n" + FETCH + b"R") * 4000,
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_fill_the_memory(tmp_path: Path, name: str, old: bool) -> None:
    if old:
        start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        (tmp_path / "x.pth").write_bytes(b"".join([*start, b"\x80\x02](" + BOMBS[name] + b"e.", pickle.dumps([], 2)]))
    else:
        with_pickle(tmp_path / "x.pth", b"\x80\x02](" + BOMBS[name] + b"e.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="refused: its pickle might fill the memory: it calls bytearray, or"):
        load(tmp_path / "x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_arrays_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    """10^12 numbers from 8 bytes."""
    torch.save({"state_dict": {"w": np.zeros(2, dtype="f4")}}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        code = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"K\x02\x85" in code
    with_pickle(tmp_path / "x.pth", code.replace(b"K\x02\x85", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85"))
    with pytest.raises(CheckpointError, match="holds an array that is not of numbers, w"):
        load(tmp_path / "x.pth")


def test_stand_ins_keep_nothing() -> None:
    """Neither arguments nor attributes nor what would be called later."""
    for stand_in, name in inert.STAND_INS:
        made = stand_in(os.system, TOUCH)
        if isinstance(made, inert.Inert) and not isinstance(made, inert.NumberType | inert.Array):
            made.__setstate__({"__call__": os.system})
            assert vars(made) == {}, name
        else:
            assert isinstance(made, inert.Inert) or not made, name
