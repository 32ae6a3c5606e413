"""Commands of the repository in processes that need not load torch again: each is forked from one that has.

A Server is such a process; its `start` gives a Command, with what subprocess.Popen has of use: pid, poll, send_signal,
wait. The streams, sys.argv and __main__ of a command are as a user's call has them, and so are signals and exit codes.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Command:
    """A command that runs, or has ended."""

    def __init__(self, server: "Server", pid: int, errors: Path) -> None:
        self.server, self.pid, self._errors = server, pid, errors
        self.returncode: int | None = None

    def ask(self, what: str) -> None:
        if self.returncode is None:
            self.returncode = self.server.ask({"pid": self.pid, "what": what})

    def poll(self) -> int | None:
        """The exit code, or -N after signal N; None while it runs."""
        self.ask("poll")
        return self.returncode

    def wait(self, seconds: float = 120) -> str:
        """Wait for its end, no longer than `seconds`. Returns what it wrote to stderr."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"a command has not ended in {seconds:g} s")
            time.sleep(0.01)
        return self._errors.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # its number is not another's: the server has not waited for it
            os.kill(self.pid, number)

    def stop(self) -> bool:
        """SIGSTOP; returns whether it stands still, and has not ended."""
        self.send_signal(signal.SIGSTOP)
        self.ask("wait until it stands still")
        return self.returncode is None


class Server:
    """A process that has loaded torch, and forks a command when it is asked to."""

    def __init__(self) -> None:
        words = [sys.executable, __file__]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict[str, object]) -> int | None:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        found: int | None = json.loads(self.process.stdout.readline())
        return found

    def start(self, words: list[str], errors: Path) -> Command:
        """Start `words`, a file of the repository and its flags, with stderr to the file `errors`."""
        pid = self.ask({"words": words, "errors": str(errors)})
        assert pid
        return Command(self, pid, errors)

    def close(self) -> None:
        self.process.communicate()


def fork(words: list[str], errors: str) -> int:
    child = os.fork()
    if child:
        return child
    for number, file in ((0, os.devnull), (1, os.devnull), (2, errors)):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def answer(pid: int, what: str) -> int | None:
    if what == "wait until it stands still":
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    done, status = os.waitpid(pid, 0 if what == "wait" else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    sys.path[0] = str(ROOT)
    import torch._dynamo  # noqa: F401 what the first optimiser loads

    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(fork(**request) if "words" in request else answer(**request)), flush=True)


if __name__ == "__main__":
    main()
