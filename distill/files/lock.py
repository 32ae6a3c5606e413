"""One process at a time holds a directory: by the kernel's lock, or by a file where the file system has no locks."""

import errno
import fcntl
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from distill.errors import UserError

LOCK, HELD = "lock", "lock.held"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # Lustre, some NFS
SETTLED = 0.2  # seconds after which a file that was just made is looked at again


class DirectoryLock:
    """`directory` is this process's from here until `release`. Raises UserError, naming the holder, if it is another's.

    The lock is the kernel's (flock), which ends with its process, however that dies. Where the file system has none, it
    is the file HELD, made by O_EXCL, with host, process and its start in it: that of a process of this host that is
    gone is taken over, and one of another host is named with what to do.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = open(directory / LOCK, "a+")  # noqa: SIM115 stays open as long as the directory is held
        self._held = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # the holder may have taken the lock a moment ago and not have written yet
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise _in_use(directory, holder) from None
        except OSError as error:
            self._file.close()
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"cannot lock {directory / LOCK}: {error.strerror}; choose an --output elsewhere"
                ) from None
            self._hold_by_file(str(error.strerror))
            return
        self._file.truncate(0)
        self._file.write(f"{_myself()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let the directory go."""
        self._file.close()
        if self._held:
            (self.directory / HELD).unlink(missing_ok=True)

    def _hold_by_file(self, why: str) -> None:
        path, own = self.directory / HELD, f"{_myself()}\n"
        with suppress(OSError):
            if _is_gone(path.read_text()):
                path.unlink(missing_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            holder = path.read_text().strip() if path.exists() else ""
            raise _in_use(self.directory, holder, f"remove {path} if that is over, ") from None
        with open(descriptor, "w") as file:
            file.write(own)
        time.sleep(SETTLED)  # another may have found the same file of a process that is gone, and have removed this one
        if not path.exists() or path.read_text() != own:
            raise _in_use(self.directory, "another process")
        self._held = True
        print(f"warning: no locks in {self.directory} ({why}): {path} stands for one", file=sys.stderr)


def _in_use(directory: Path, holder: str, hint: str = "") -> UserError:
    who = holder or "another process"
    return UserError(f"{directory} is in use by {who}; wait for it, {hint}or choose another --output")


def _myself() -> str:
    started = _start_of(os.getpid())
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%dT%H:%M:%S%z')}" + (
        f" (start {started})" if started else ""
    )


def _is_gone(holder: str) -> bool:
    """Whether `holder`, as of _myself, is a process of this host that has ended; its number may be another's by now."""
    match = re.match(r"process (\d+) on (.*), since [^ ]*(?: \(start (\d+)\))?$", holder.strip())
    if not match or match[2] != socket.gethostname():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # another user's
    started = _start_of(int(match[1]))
    return bool(match[3] and started and match[3] != started)


def _start_of(process: int) -> str:
    """When a process started, in ticks since the machine did; nothing where /proc does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
