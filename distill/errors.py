"""What ends a run with one line: mistakes that a person can put right, and what machines do. Knows no torch."""


class UserError(ValueError):
    """Something a person can put right. Shown as one line on stderr, without a traceback; exit code 2.

    `told`: another process of the same run shows it.
    """

    exit_code = 2
    told = False


class CheckpointError(UserError):
    """A file that cannot be read or written as a checkpoint: names the path, the cause and what to do."""


def lost_process(error: BaseException) -> bool:
    """Whether a RuntimeError says that another process of the run is gone."""
    return type(error).__name__.startswith("Dist") or any(word in str(error) for word in ("gloo", "NCCL"))


def out_of_memory(error: BaseException) -> bool:
    """Whether a MemoryError or RuntimeError says that memory ran out, on the host or on a device."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")  # of CUDA, of the CPU, of cuBLAS
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
