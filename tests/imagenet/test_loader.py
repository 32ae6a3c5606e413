"""Loader processes on machines that lack something: open files, memory files, semaphores, a short TMPDIR."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import current_process, util
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar10.folder import _decode_file
from imagenet import loader
from imagenet.augment import PhotoViews
from imagenet.decoding import read_centre
from imagenet.loader import AT_MOST, Job, LoaderError, Workers

POLICY = PhotoViews("crop", 8)


@pytest.fixture
def files(photos: Path) -> list[str]:
    return [str(file) for file in sorted((photos / "train").rglob("*.*"))]


def one_by_one(files: list[str], count: int) -> Iterator[Job]:
    """Batches of one photo: 1,024 of them would be in the making by the number of photos."""
    for number in range(count):
        yield Job([files[number % len(files)]], np.array([number]), np.array([0]))


def test_few_files_are_open_at_a_time(files: list[str]) -> None:
    """However small the batches are, and however many of them a caller keeps."""
    count, most, kept = 3 * AT_MOST, 0, []
    with Workers(1) as workers:
        next(workers.render(POLICY, one_by_one(files, 1)))
        before = len(os.listdir("/proc/self/fd"))
        for images in workers.render(POLICY, one_by_one(files, count)):
            kept.append(images)
            most = max(most, len(os.listdir("/proc/self/fd")))
        assert most - before <= AT_MOST
        assert len(os.listdir("/proc/self/fd")) <= before
    expected = Workers(0).render(POLICY, one_by_one(files, count))
    assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))


@pytest.mark.parametrize("limits", [(40, 4096), (40, 300), (40, resource.RLIM_INFINITY)])
def test_the_soft_limit_is_raised_as_far_as_it_goes(limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: found.append(pair))
    loader._allow_files(512)
    assert found == [(300 if limits[1] == 300 else 512, limits[1])]
    loader._allow_files(40)
    assert len(found) == 1


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("jobs", [0, 12], ids=["idle", "busy"])
def test_a_worker_that_dies_takes_the_others_along(jobs: int, victim: int) -> None:
    """Whichever it is: the others, whom SIGTERM does not end, are not waited for."""
    start = time.monotonic()
    with Workers(3) as workers:
        for future in [workers._submitted(time.sleep, 0.2) for _ in range(3)]:
            workers._result(future)
        futures = [workers._submitted(time.sleep, 1) for _ in range(jobs)]
        others = multiprocessing.active_children()
        os.kill(list(workers._pool._processes)[victim], signal.SIGKILL)  # type: ignore[union-attr]
        answers = map(workers._result, futures or iter(lambda: workers._submitted(time.sleep, 0.1), None))
        with pytest.raises(LoaderError, match="a loader worker has died"):
            list(answers)
    assert not any(process.is_alive() for process in others)
    assert time.monotonic() - start < 30


STOPPED = """
import time
from imagenet.loader import Workers

if __name__ == "__main__":
    with Workers(1, minutes=4 / 60) as workers:
        workers._result(workers._submitted(time.sleep, 0.01))
        future = workers._submitted(time.sleep, 6.5)
        print("waiting", flush=True)
        workers._result(future)
    print("done")
"""


@pytest.mark.slow
def test_a_job_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """For longer than a worker may take: nobody is late by that."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(Path(loader.__file__).parent.parent)}
    command = [sys.executable, str(tmp_path / "stopped.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "done\n"
    assert process.returncode == 0


@pytest.mark.parametrize("policy", [POLICY, PhotoViews("randaugment", 32)], ids=lambda policy: policy.policy)
@pytest.mark.parametrize("absent", ["memfd_create", "semaphores"])
def test_without_memory_files_and_without_semaphores(
    absent: str,
    policy: PhotoViews,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where a container forbids memfd_create, and where /dev/shm is read only.

    Colours are drawn by the generator that all threads share, and the network's dropout with them.
    """

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    if absent == "semaphores":
        monkeypatch.setattr(loader, "ProcessPoolExecutor", refuse)
    monkeypatch.setattr(os, "memfd_create", refuse)
    before = torch.get_rng_state()
    with Workers(4) as workers:
        found = list(workers.render(policy, one_by_one(files, 24)))
    expected = Workers(0).render(policy, one_by_one(files, 24))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    said = capsys.readouterr().out
    assert said.count("warning: no loader processes can be had (Read-only file system)") == (absent == "semaphores")


def test_sockets_are_kept_where_their_paths_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delitem(current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    loader._shorten_sockets()
    assert len(util.get_temp_dir()) < 100 - len("/listener-12345678")
    assert tempfile.gettempdir() == str(deep)
    current_process()._config.pop("tempdir")  # type: ignore[attr-defined]


def test_too_many_open_files_are_no_broken_photo(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--skip-bad-images would leave it out."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        read_centre(files[0], 8, 8, "bilinear", "pillow")
    with pytest.raises(OSError, match="Too many open files"):
        _decode_file(files[0])
