"""What computed a run: the commit of this repository, versions, the machine."""

import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from distill.parallel.devices import describe_device

ROOT = Path(__file__).resolve().parents[2]
CODE = ("cifar10/*.py", "distill/*.py", "imagenet/*.py")  # a new file here is a network or a method that is found
WRITTEN = (":(exclude)*.md", ":(exclude)checkpoints/records")  # by results.py, and so by each run of reproduce.sh


def commit() -> str | None:
    """Returns the commit of this repository, with `-dirty` where its files differ, or there is code beside them.

    Pages and records are left out: results.py writes them. None for a tree that is no checkout, be it inside another
    repository.
    """
    if not (ROOT / ".git").exists():  # a directory, in a worktree a file; git itself would look further up
        return None
    try:
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
        changes += _git("status", "--porcelain", "--untracked-files=all", "--", *CODE)
        return _git("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # as hooks of git set them
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=environment)
    return completed.stdout.strip()


def versions() -> dict[str, str]:
    """Returns the versions of what computes."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the name of the host, its system and the device."""
    return {"host": socket.gethostname(), "system": platform.platform(), "device": describe_device(device)}
