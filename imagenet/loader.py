"""Processes that render photos into memory which they share with this one.

A batch is rendered in small parts by all of them, each row at its place, so that their number changes nothing.
Signals to stop are this process's business: the workers have them blocked, and end when it does.
"""

import math
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as LateError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import BrokenImage, UserError, too_many_files
from imagenet.augment import PhotoViews
from imagenet.decoding import examine

AHEAD = 3, 1024  # batches in the making at least, and photos
AT_MOST = 64  # batches in the making: each is an open file
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
LONGEST = 70  # bytes of a directory for sockets: of the 104 of a socket's path multiprocessing adds 33
PART = 16  # photos of a task, at most
# A scheduler may signal every process of a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class LoaderError(UserError):
    """A worker has died, or does not answer."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """Photos to render: their files, and numbers and views int64 (B,)."""

    files: Sequence[str]
    indices: NDArray[np.int64]
    views: NDArray[np.int64]


@dataclass(frozen=True)
class Findings:
    """What there is to say of files, of which each was decoded once."""

    broken: dict[str, str] = field(default_factory=dict)  # file -> why it cannot be decoded
    turned: int = 0  # files that EXIF would turn
    dim: list[str] = field(default_factory=list)  # files of 16 bits that are nearly black

    def __add__(self, other: "Findings") -> "Findings":
        return Findings(self.broken | other.broken, self.turned + other.turned, self.dim + other.dim)


class _Worker(ForkServerProcess):
    """A process that SIGTERM does not end.

    Where one worker dies, the pool terminates the others and waits for them, in Python 3.12 for ever.
    """

    def terminate(self) -> None:
        """Kills it."""
        self.kill()


class _Context(ForkServerContext):
    """How workers are started: a fork of this process would copy its threads' locks."""

    Process = _Worker  # type: ignore[assignment]


class Workers:
    """`count` processes; with 0 of them this one renders. They start when they are first needed."""

    def __init__(self, count: int, minutes: float = 5.0) -> None:
        self.count, self._seconds = count, 60 * minutes
        self._pool: Executor | None = None

    def render(self, policy: PhotoViews, jobs: Iterator[Job]) -> Iterator[Tensor]:
        """uint8 (B, S, S, 3) for each job, in order; those that follow are in the making meanwhile.

        Raises BrokenImage, with all files among those in the making that cannot be decoded, LoaderError if a worker
        dies or is late.
        """
        if not self.count or (policy.seeds_torch and isinstance(self._started(), ThreadPoolExecutor)):
            yield from (_render_all(policy, job) for job in jobs)
            return
        waiting: deque[tuple[Any, Tensor, list[Future[None]]]] = deque()
        try:
            for job in jobs:
                if len(waiting) >= min(max(AHEAD[0], AHEAD[1] // len(job.files)), AT_MOST):
                    yield self._finished(*waiting.popleft())
                file, path = _memory()
                shape = (len(job.files), policy.size, policy.size, 3)
                size = int(np.prod(shape))
                os.truncate(file.fileno(), size)
                # not by numpy, whose maps hold a file open each: a caller may keep any number of batches
                images = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(shape)
                waiting.append((file, images, self._submit(policy, job, path, shape)))
            while waiting:
                yield self._finished(*waiting.popleft())
        except BrokenImage as error:
            others = self._broken([future for _, _, futures in waiting for future in futures])
            raise BrokenImage(error.files | others) from None
        finally:
            for file, _, futures in waiting:
                for future in futures:
                    future.cancel()
                file.close()

    def examine(self, files: Sequence[str], decoder: str) -> Iterator[Findings]:
        """Decodes every file; of each part of them, in order, what was found."""
        parts = ((list(files[start : start + PART]), decoder) for start in range(0, len(files), PART))
        if not self.count:
            yield from (_examine(*part) for part in parts)
            return
        waiting: deque[Future[Findings]] = deque()
        for part in parts:
            waiting.append(self._submitted(_examine, *part))
            if len(waiting) > 4 * self.count:
                yield self._result(waiting.popleft())
        while waiting:
            yield self._result(waiting.popleft())

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _started(self) -> Executor:
        if self._pool is None:
            _allow_files(256 + 4 * self.count)
            _shorten_sockets()
            try:
                self._pool = self._processes()
            except (OSError, ImportError, NotImplementedError) as error:  # e.g. no semaphores: /dev/shm is read only
                if too_many_files(error):
                    raise
                why = getattr(error, "strerror", None) or error
                print(f"warning: no loader processes can be had ({why}): threads decode, on fewer cores at a time;")
                print("where --augment changes colours, this process alone does")
                self._pool = ThreadPoolExecutor(self.count)
        return self._pool

    def _processes(self) -> Executor:
        context = _Context()
        context.set_forkserver_preload(["torch", "torchvision.transforms", "torchvision.io"])
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            resource_tracker.ensure_running()  # unblocks some of them
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            forkserver.ensure_running()  # it and the workers inherit what is blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return ProcessPoolExecutor(self.count, context, initializer=_begin)

    def _submit(self, policy: PhotoViews, job: Job, path: str, shape: tuple[int, ...]) -> "list[Future[None]]":
        size = min(PART, -(-max(len(job.files), AHEAD[1]) // self.count))  # of all that is in the making
        status = os.stat(path)
        memory, futures = (path, status.st_dev, status.st_ino), []
        for start in range(0, len(job.files), size):
            rows = slice(start, start + size)
            part = Job(list(job.files[rows]), job.indices[rows], job.views[rows])
            futures.append(self._submitted(_render_part, policy, part, memory, shape, start))
        return futures

    def _submitted(self, work: Callable[..., Any], *given: Any) -> "Future[Any]":
        try:
            return self._started().submit(work, *given)
        except BrokenProcessPool:
            raise self._dead() from None

    def _finished(self, file: Any, images: Tensor, futures: "list[Future[None]]") -> Tensor:
        with file:
            if broken := self._broken(futures):
                raise BrokenImage(broken)
        return images  # the memory lives as long as the tensor

    def _broken(self, futures: "list[Future[None]]") -> dict[str, str]:
        """The files that could not be decoded in these parts, when all of them are done."""
        broken: dict[str, str] = {}
        for future in futures:
            try:
                self._result(future)
            except BrokenImage as error:
                broken |= error.files
        return broken

    def _result(self, future: "Future[Any]") -> Any:
        for _ in range(math.ceil(self._seconds)):  # in steps: time for which this process is stopped makes nobody late
            if wait([future], 1).done:
                break
        try:
            return future.result(0)
        except BrokenProcessPool:
            raise self._dead() from None
        except LateError:
            for process in multiprocessing.active_children():
                process.kill()
            self.close()
            seconds = f"{self._seconds:g} s"
            raise LoaderError(f"a loader worker has not answered for {seconds}; what was saved is kept") from None

    def _dead(self) -> LoaderError:
        self.close()
        return LoaderError("a loader worker has died (out of memory? try fewer --workers); what was saved is kept")


def _memory() -> tuple[Any, str]:
    """A file in memory, where the system has such, and the path by which other processes open it."""
    try:  # not /dev/shm, which is small in containers
        file: Any = os.fdopen(os.memfd_create("views"), "r+b")
        return file, f"/proc/{os.getpid()}/fd/{file.fileno()}"
    except (AttributeError, OSError) as error:  # other systems, old kernels, containers that forbid it
        if too_many_files(error):
            raise
    named = tempfile.NamedTemporaryFile()  # noqa: SIM115 open until its batch is done
    return named, named.name


def _allow_files(count: int) -> None:
    """Raises the soft limit on open files to `count`, as far as the hard one lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _shorten_sockets() -> None:
    """Let multiprocessing keep its sockets elsewhere where TMPDIR's path is too long for them."""
    usual = tempfile.gettempdir()
    short = [place for place in SHORT if os.access(place, os.W_OK | os.X_OK)]
    if len(os.fsencode(usual)) <= LONGEST or not short:
        return
    tempfile.tempdir = short[0]
    try:
        util.get_temp_dir()  # chosen once for a process and those that it starts
    finally:
        tempfile.tempdir = usual


# ------------------------------------------------------------------------------------------------------ in the workers
def _begin() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()  # also when it is killed
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _render_all(policy: PhotoViews, job: Job) -> Tensor:
    images = torch.empty((len(job.files), policy.size, policy.size, 3), dtype=torch.uint8)
    _render_into(images, policy, job)
    return images


def _render_part(
    policy: PhotoViews, part: Job, memory: tuple[str, int, int], shape: tuple[int, ...], start: int
) -> None:
    """Render the rows from `start` on into `memory`: its path, device and inode."""
    path, *same = memory
    with open(path, "r+b") as file:
        status = os.fstat(file.fileno())
        if [status.st_dev, status.st_ino] != same:
            return  # nobody waits for it any more, and the path is that of another file by now
        array = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=shape))
    _render_into(array[start : start + len(part.files)], policy, part)


def _render_into(images: Tensor, policy: PhotoViews, part: Job) -> None:
    """Makes each image its view. Raises BrokenImage, with all the files that cannot be decoded."""
    broken: dict[str, str] = {}
    for image, *row in zip(images, part.files, part.indices.tolist(), part.views.tolist(), strict=True):
        try:
            image.copy_(policy.render(*row))
        except BrokenImage as error:
            broken |= error.files
    if broken:
        raise BrokenImage(broken)


def _examine(files: list[str], decoder: str) -> Findings:
    broken: dict[str, str] = {}
    turned, dim = 0, []
    for file in files:
        try:
            is_turned, is_dim = examine(file, decoder)
        except BrokenImage as error:
            broken |= error.files
            continue
        turned += is_turned
        dim += [file] if is_dim else []
    return Findings(broken, turned, dim)
