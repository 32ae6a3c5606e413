"""What ends a run with one line: mistakes that a person can put right, and what machines do. Knows no torch."""

import errno


class UserError(ValueError):
    """Something a person can put right. Shown as one line on stderr, without a traceback; exit code 2.

    `already_reported`: another process of the same run shows it.
    """

    exit_code = 2
    already_reported = False


class OtherRunError(UserError):
    """A directory holds another run: `found` says in what it differs, `hint` what to do."""

    def __init__(self, found: str, hint: str) -> None:
        super().__init__(found, hint)  # what it is pickled with, on its way from another process
        self.found, self.hint = found, hint

    def __str__(self) -> str:
        return f"{self.found}; {self.hint}"


class CheckpointError(UserError):
    """A file that cannot be read or written as a checkpoint: names the path, the cause and what to do."""


class CannotReadError(CheckpointError):
    """A file that the disk or the memory does not give at the moment: it may be whole."""


def lost_process(error: BaseException) -> bool:
    """Whether a RuntimeError says that another process of the run is gone."""
    return type(error).__name__.startswith("Dist") or any(word in str(error) for word in ("gloo", "NCCL"))


def out_of_memory(error: BaseException) -> bool:
    """Whether a MemoryError, OSError or RuntimeError says that memory ran out, on the host or on a device."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")  # of CUDA, of the CPU, of cuBLAS
    told = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return told or any(word in str(error) for word in words)


def too_many_files(error: BaseException) -> bool:
    """Whether an error says that this process, or the machine, may not open one more file."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error)


class BrokenImage(UserError):
    """Image files that cannot be decoded: `files` has the cause of each, the message names the first five."""

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__(files)  # what it is pickled with, on its way from another process
        self.files = files

    def __str__(self) -> str:
        return f"{self.named}; --skip-bad-images leaves out up to 0.1 % of them, or one"

    @property
    def named(self) -> str:
        """`cannot decode FILE: cause`, of several `3 images are broken: cannot decode FILE: cause; ...`."""
        return self.causes if len(self.files) == 1 else f"{len(self.files)} images are broken: {self.causes}"

    @property
    def causes(self) -> str:
        """Returns `cannot decode FILE: cause` for the first five files."""
        lines = [f"cannot decode {file}: {cause}" for file, cause in sorted(self.files.items())]
        return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
