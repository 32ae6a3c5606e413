"""Standard streams that fail, are closed, or cannot say a name: one line, or none, and the work is kept."""

import errno
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config.output import OutputError, Stream, format_duration

ROOT = Path(__file__).resolve().parents[2]
NAME = "'caf\\udce9 \\xe9 \\u65e5'"  # in Python's spelling: Latin-1 of a file system in UTF-8, and what ASCII lacks


def python(body: str, **streams: object) -> "subprocess.CompletedProcess[bytes]":
    """Run `body`, in the main function of a command."""
    code = f"import sys\nfrom distill.config import cli\ndef main(argv):\n    {body}\ncli.run(main)\n"
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False, **settings)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"caf\\udce9 \\xe9 \\u65e5\n"),
        ("utf-8", "caf\\udce9 é 日\n".encode()),
        ("latin-1", b"caf\\udce9 \xe9 \\u65e5\n"),
    ],
)
def test_names_that_the_encoding_lacks(encoding: str, expected: bytes) -> None:
    found = python(f"print({NAME})", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (found.returncode, found.stdout, found.stderr) == (0, expected, b"")
    refused = python(f"raise cli.UserError({NAME})", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (refused.returncode, refused.stderr) == (2, b"error: " + expected)


def test_what_may_not_be_read_or_written_is_named() -> None:
    found = python("raise PermissionError(13, 'Permission denied', '/data/train')")
    assert (found.returncode, found.stderr) == (2, b"error: /data/train: Permission denied\n")


def test_standard_input_may_name_any_file() -> None:
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    found = python("print(ascii(sys.stdin.readline()))", input=b"caf\xe9.png\n", env=strict)
    assert (found.returncode, found.stdout) == (0, b"'caf\\udce9.png\\n'\n")


def test_standard_output_on_a_full_disk() -> None:
    with open("/dev/full", "wb") as full:
        found = python("print('x'); print('never')", stdout=full)
        assert found.returncode == 1
        assert found.stderr == b"error: cannot write standard output: No space left on device; what was saved is kept\n"
        silent = python("raise cli.UserError('x')", stdout=full, stderr=full)
        assert silent.returncode == 2


def test_a_reader_that_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    found = python("[print(k) for k in range(9)]", stdout=writing)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, b"")


def test_closed_streams(tmp_path: Path) -> None:
    """The next file that is opened would be number 1, and what is printed would go into it."""
    file = tmp_path / "data"
    body = f"f = open({str(file)!r}, 'wb'); print('x', file=sys.stdout); print('y', file=sys.stderr); f.write(b'data')"
    closing = 'exec "$0" -c "$1" <&- >&- 2>&-'
    imports = "import sys\nfrom distill.config import cli\n"
    code = f"{imports}def main(argv):\n    {body}; assert f.fileno() > 2\ncli.run(main)\n"
    found = subprocess.run(["sh", "-c", closing, sys.executable, code], cwd=ROOT, timeout=60, check=False)
    assert found.returncode == 0
    assert file.read_bytes() == b"data"


def test_a_lost_terminal_is_written_no_more() -> None:
    """Its end comes as SIGHUP; what is printed before the run has saved must not end it earlier."""
    ours, theirs = pty.openpty()
    stream = Stream(theirs, "utf-8")
    stream.write("heard\n")
    assert b"heard" in os.read(ours, 100)
    os.close(ours)
    for _ in range(2):
        assert stream.write("lost\n") == 5
        stream.flush()
    os.close(theirs)


def test_a_disk_that_fails_is_no_terminal(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)

    def fail() -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OutputError, match="cannot write standard output: Input/output error"):
        Stream(descriptor, "utf-8")._guarded(fail, 0)
    os.close(descriptor)


def test_durations() -> None:
    assert [format_duration(s) for s in (0.4, 89, 90, 3599, 3600, 9000)] == [
        *("0 s", "89 s", "2 min", "60 min", "1.0 h", "2.5 h")
    ]
