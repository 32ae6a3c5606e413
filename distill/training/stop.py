"""How a run ends before its end: signals, and memory that does not suffice."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distill.config.recipe import Recipe
from distill.errors import UserError, out_of_memory

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(UserError):
    """A run ended early by itself or by a signal: a line that says where it stands, and the exit code."""

    def __init__(self, message: str, exit_code: int, *, already_reported: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.already_reported = exit_code, already_reported


class Diverged(Stopped):
    """The loss, its gradient or a weight is not finite at `step`, counted from the run's first."""

    def __init__(self, message: str, step: int, *, already_reported: bool = False) -> None:
        super().__init__(message, 1, already_reported=already_reported)
        self.step = step


class StopRequest:
    """While entered: a signal only sets a flag, read at the next step boundary; a second signal ends at once.

    A second one that comes soon after is the same request. A terminal that is lost sends SIGHUP twice, and a machine
    that shuts down SIGTERM and SIGHUP: within 2 s, though a second SIGINT is a person's. Under torchrun within 30 s: a
    scheduler signals every process of a job, and torchrun passes on what it gets.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "StopRequest":
        heard = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup has it so
        self._before = {number: signal.signal(number, self._request) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Returns whether a signal has come."""
        return self.signal is not None

    def _request(self, number: int, _frame: FrameType | None) -> None:
        grace = 30.0 if self._launched else 0.0 if number == signal.SIGINT else 2.0
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= grace:
            os._exit(128 + number)  # no handler and no cleaning up in between; a save is atomic at any instant


@contextmanager
def memory_advice(recipe: Recipe, run: Path) -> Iterator[None]:
    """Turns running out of memory into a line with the batch size; the last checkpoint stays as it is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        size = recipe.batch_size
        advice = f"out of memory with --batch-size {size}; try {max(1, size // 2)} with half the --lr"
        raise Stopped(f"{advice}; checkpoints in {run} are intact", 1) from None
