"""Standard output and errors that outlive what they are connected to: a closed one, a full disk, a lost terminal."""

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from distill.errors import UserError

Result = TypeVar("Result")


class OutputError(UserError):
    """Standard output cannot be written."""

    exit_code = 1


class Stream(io.TextIOWrapper):
    """File descriptor 1 or 2 as text, line by line, so that a log file has every line, also of a run that is killed.

    What its encoding lacks is written as an escape with a backslash. A terminal that is gone is written no more, and
    nothing is raised: the run goes on, or ends by the SIGHUP that comes with it. So it is with any trouble on 2.
    Otherwise writing raises OutputError, or BrokenPipeError.
    """

    def __init__(self, descriptor: int, encoding: str | None) -> None:
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115 as long as the process lives
        super().__init__(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)
        self._descriptor, self._terminal = descriptor, os.isatty(descriptor)

    def write(self, text: str) -> int:
        """Writes text."""
        return self._guarded(lambda: super(Stream, self).write(text), len(text))

    def flush(self) -> None:
        """Writes what waits."""
        self._guarded(super().flush, None)

    def _guarded(self, work: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return work()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)  # what is waiting to be written would fail again
            os.close(nowhere)
            super().flush()
            lost = self._terminal and error.errno in (errno.EIO, errno.ENXIO)
            if self._descriptor == 2 or lost:
                return otherwise
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(f"cannot write standard output: {error.strerror}; what was saved is kept") from None


def format_duration(seconds: float) -> str:
    """Returns `2.5 h`, `3 min` or `40 s`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{round(seconds / 60)} min" if seconds >= 90 else f"{round(seconds)} s"


def prepare() -> None:
    """Makes the three standard streams of this process usable, also where it was started with them closed.

    Otherwise the next files to be opened would take their numbers, and what is printed would go into these files.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # something was read from it before
            sys.stdin.reconfigure(errors="surrogateescape")  # the name of a file may be any bytes
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is None or isinstance(before, io.TextIOWrapper):
            if before is not None:
                before.flush()
            setattr(sys, name, Stream(descriptor, before.encoding if before else "utf-8"))
