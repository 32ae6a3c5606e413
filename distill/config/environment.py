"""What a process may use of its machine, and whether it is one of several of a run. Knows no torch."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
LATE = 60.0  # seconds of waiting after which a line says for what


@dataclass(frozen=True)
class Ranks:
    """The numbers of a process among all of its run and among those on its machine, both from 0, and their count."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The place that torchrun, or another launcher, gives this process: Ranks() where it is alone.

    Platforms set some of these variables for processes that nobody joins. So RANK counts only with a WORLD_SIZE above
    1, and then all that joining takes must be there. Raises UserError if it is not, or is no number.
    """
    given = {name: environment.get(name, "").strip() for name in (*PLACE, *MEETING)}
    if given["WORLD_SIZE"] in ("", "0", "1"):
        return Ranks()
    missing = [name for name, value in given.items() if not value]
    problems = [f"{', '.join(missing)} not"] if missing else []
    problems += [f"{k} is {given[k]!r}" for k in (*PLACE, "MASTER_PORT") if given[k] and not given[k].isdecimal()]
    if not problems:
        place = Ranks(*(int(given[name]) for name in PLACE))
        if max(place.rank, place.local_rank) < place.world_size:
            return place
        problems = [f"RANK is {place.rank}, LOCAL_RANK {place.local_rank}"]
    raise UserError(
        f"WORLD_SIZE={given['WORLD_SIZE']} is in the environment, but {', '.join(problems)}: `unset WORLD_SIZE` for "
        "one process; for several leave these variables to NPROC=N bash scripts/..., or to torchrun"
    )


def is_joined(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several of a run."""
    try:
        return find_ranks(environment).world_size > 1
    except UserError:
        return False


def cores(system: Path = Path("/")) -> int:
    """Returns the number of processors that this process may use, at least 1.

    These are those of its affinity, and no more than the quotas of its cgroups, v1 and v2, rounded up. system: where
    /proc and /sys lie.
    """
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([able, *(-(-quota // period) for quota, period in _quotas(system))]))


def _quotas(system: Path) -> Iterator[tuple[int, int]]:
    """(quota, period) in microseconds of each cgroup that this process is in and that has a quota."""
    root, own = system / "sys/fs/cgroup", [""]
    with suppress(OSError):
        lines = (system / "proc/self/cgroup").read_text().splitlines()
        fields = [line.split(":", 2) for line in lines if line.count(":") > 1]
        own = [path for _, names, path in fields if not names or "cpu" in names.split(",")] or own
    groups = {parent for path in own for parent in ("/", *_parents(path))}  # a container may see its own as the root
    for group in groups:
        for base in (root, root / "cpu", root / "cpu,cpuacct"):
            place = base / group.lstrip("/")
            with suppress(OSError, ValueError):
                quota, period = (place / "cpu.max").read_text().split()
                yield int(quota), int(period)
            with suppress(OSError, ValueError):
                quota, period = ((place / f"cpu.cfs_{k}_us").read_text() for k in ("quota", "period"))
                if int(quota) > 0:
                    yield int(quota), int(period)


def _parents(path: str) -> Iterator[str]:
    while path.strip("/"):
        yield path
        path = path.rpartition("/")[0]


@contextmanager
def announced(what: str, seconds: float = LATE, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """While entered for longer than `seconds`: a line on stderr, `waiting for WHAT`, once, `unless` that holds then."""

    def tell() -> None:
        if not unless():
            print(f"waiting for {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def not_met(what: str, port: object, error: BaseException) -> UserError:
    """The line for an error of waiting for `what`: the port is in use, or they did not come."""
    first = str(error).splitlines()[0]
    if "EADDRINUSE" in first or "address already in use" in first.lower():
        return UserError(f"MASTER_PORT {port} is in use on this machine: set another, for all processes of the run")
    return UserError(f"gave up waiting for {what} ({first:.160})")
