"""Who holds a directory where the file system has no locks."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.files import lock as hold
from distill.files.lock import HELD, DirectoryLock


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def unlocked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on a file system without flock."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(hold, "SETTLED", 0.0)
    return tmp_path


def test_a_file_stands_for_the_lock(unlocked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = DirectoryLock(unlocked)
    warned = capsys.readouterr().err
    assert warned.count("\n") == 1
    assert warned.startswith(f"warning: no locks in {unlocked} (")
    assert f"process {os.getpid()} on {socket.gethostname()}" in (unlocked / HELD).read_text()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .* remove {unlocked / HELD} if that is"):
        DirectoryLock(unlocked)
    held.release()
    assert not (unlocked / HELD).exists()
    DirectoryLock(unlocked).release()


def test_a_process_that_is_gone_holds_nothing(unlocked: Path) -> None:
    """Also where its number is another's by now, such as this one's."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, start in ((ended.pid, 5), (os.getpid(), 5)):
        (unlocked / HELD).write_text(f"process {process} on {socket.gethostname()}, since x (start {start})\n")
        DirectoryLock(unlocked).release()


@pytest.mark.parametrize("holder", ["process 4711 on elsewhere, since x (start 5)", "", "\x00"])
def test_another_host_and_the_unknown_are_not_taken_over(unlocked: Path, holder: str) -> None:
    (unlocked / HELD).write_text(holder)
    with pytest.raises(UserError, match="is in use by "):
        DirectoryLock(unlocked)
    assert (unlocked / HELD).read_text() == holder


def test_of_two_that_take_over_at_once_one_wins(unlocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has removed this one's file in between, and made its own."""
    monkeypatch.setattr(
        "distill.files.lock.time.sleep", lambda _: (unlocked / HELD).write_text("process 1 on elsewhere")
    )
    with pytest.raises(UserError, match="is in use by another process"):
        DirectoryLock(unlocked)
    assert (unlocked / HELD).exists()


def test_the_next_takes_over_after_a_kill(unlocked: Path) -> None:
    code = (
        "import errno, fcntl, os, pathlib, signal, sys\n"
        "def flock(*_): raise OSError(errno.ENOLCK, 'none')\n"
        "fcntl.flock = flock\n"
        "from distill.files.lock import DirectoryLock\n"
        "DirectoryLock(pathlib.Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code, str(unlocked)], cwd=root, stderr=subprocess.DEVNULL, check=False)
    assert (unlocked / HELD).exists()
    DirectoryLock(unlocked).release()
