"""Files from the network: verified, tried again, and nothing half under its name."""

import socket
import time
from pathlib import Path

import torch

from distill.recipe import UserError

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
