"""Files from the network: verified, tried again, and nothing half under its name."""

import hashlib
import re
import socket
import time
from pathlib import Path
from typing import BinaryIO

import torch

from distill.errors import UserError

WAITS = (0, 2, 10)  # seconds before each attempt


def fetch(what: str, url: str, file: Path, sha256: str, by_hand: str) -> None:
    """Download `url` to `file`; `sha256`: of it, or the hexadecimal digits that it begins with.

    Raises UserError, after three attempts, with the last problem and what to do `by_hand`.
    """
    timeout, problem = socket.getdefaulttimeout(), ""
    socket.setdefaulttimeout(30)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for wait in WAITS:
            time.sleep(wait)
            print(f"downloading {url} to {file.parent}")
            try:
                torch.hub.download_url_to_file(url, str(file), sha256, progress=True)
                return
            except (OSError, RuntimeError) as error:
                problem = str(error)
    except OSError as error:
        problem = f"{file.parent}: {error.strerror}"
    finally:
        socket.setdefaulttimeout(timeout)
    raise UserError(f"could not download {what} ({problem}); {by_hand}")


def sha256_of(file: BinaryIO) -> str:
    """Returns the sha256 of an open file, in hexadecimal digits."""
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def digits(name: str) -> str:
    """The first digits of a file's sha256, as its name ends with them: `resnet152-394f9c45.pth`."""
    match = re.search(r"-([0-9a-f]{8,64})\.", name)
    assert match, name
    return match[1]


def check(file: Path, sha256: str) -> None:
    """Raises UserError unless the sha256 of `file` begins with these digits."""
    try:
        with open(file, "rb") as stream:
            actual = sha256_of(stream)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if not actual.startswith(sha256):
        raise UserError(
            f"{file} has sha256 {actual[:16]}... instead of {sha256}...: remove it, it is cut or another file"
        )
