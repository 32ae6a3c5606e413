"""Files that survive: atomic save, verified load; weights into a network.

A save goes to a temporary file in the same directory, is flushed, fsynced and renamed, and the directory is fsynced:
a kill at any instant leaves the old file or the new one. How a file is read, and never trusted: reading.py.
"""

import errno
import hashlib
import io
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import CannotReadError, CheckpointError
from distill.files.reading import read

LAST, PREVIOUS = "last.pt", "previous.pt"
TEMPORARY = ".partial"
OURS = uuid.uuid4().hex[:8]  # of this process, and of those that are forked from it
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # EBADF: CIFS


# ------------------------------------------------------------------------------------------------------------- digests
def digest(value: Any) -> str:
    """sha256 (hex) of the content of nested dicts, lists, plain values and tensors, whatever file they came from.

    Covers types, shapes and every bit of every number; of a dict also the order of its keys.
    """
    total = hashlib.sha256()
    for piece in _pieces(value):
        total.update(piece)
    return total.hexdigest()


def _pieces(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""
    elif isinstance(value, Mapping):
        yield f"dict {len(value)};".encode()
        for key, entry in value.items():
            yield from _pieces(key)
            yield from _pieces(entry)
    elif isinstance(value, (list, tuple)):
        yield f"list {len(value)};".encode()
        for entry in value:
            yield from _pieces(entry)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield f"{type(value).__name__} {value!r};".encode()
    else:
        raise TypeError(f"a checkpoint holds plain values and tensors only, not {type(value).__name__}")


# -------------------------------------------------------------------------------------------------------------- saving
def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Makes `path` hold `content`, or leave it as it was. Raises CheckpointError with path, cause and free bytes."""
    temporary = _temporary(path)
    try:
        _write(temporary, content)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _save_error(path, temporary, error) from error


def save(path: Path, payload: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Writes `payload` (plain values and tensors) with its digest; `keep_previous` keeps the former file.

    Readable with plain `torch.load(path, weights_only=True)`. Raises CheckpointError; the former file is then whole.
    """
    buffer = io.BytesIO()  # torch's own writer hides the errno of a full disk
    payload = _on_cpu(payload)  # or the file could not be opened without a GPU
    torch.save({**payload, "digest": digest(payload)}, buffer)
    temporary = _temporary(path)
    try:
        _write(temporary, buffer.getbuffer())
        if keep_previous and path.exists():
            _keep(path)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _save_error(path, temporary, error) from error


def _on_cpu(value: Any) -> Any:
    """Nested dicts, lists and tuples with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


def save_cache(path: Path, payload: dict[str, Any]) -> None:
    """`save` for what can be computed again: where it cannot be written, a line says so and work goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, payload)
    except (OSError, CheckpointError) as error:
        print(f"note: {error}; it will be computed again next time")


def _temporary(path: Path) -> Path:
    """In the same directory, so that a rename is atomic; of this process, as others may write the same file.

    In containers on one disk processes may have the same number.
    """
    return path.with_name(f"{path.name}.{os.getpid()}-{OURS}{TEMPORARY}")


def _keep(path: Path) -> None:
    """Makes PREVIOUS the file that `path` is, and leave `path` there for readers where the file system has links."""
    spare = _temporary(path.with_name(PREVIOUS))
    try:
        os.link(path, spare)
    except OSError:
        os.replace(path, path.with_name(PREVIOUS))
    else:
        os.replace(spare, path.with_name(PREVIOUS))
        spare.unlink(missing_ok=True)  # rename(2) leaves two names of one file as they are: after a kill right here


def _write(path: Path, content: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """fsync, where the file system has it for directories: the file itself was synced in any case."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _save_error(path: Path, temporary: Path, error: OSError) -> CheckpointError:
    try:
        temporary.unlink(missing_ok=True)
        _temporary(path.with_name(PREVIOUS)).unlink(missing_ok=True)
        free = f"{shutil.disk_usage(path.parent).free:,} bytes free"
    except OSError:
        free = "free bytes unknown"
    return CheckpointError(f"cannot write {path}: {error.strerror or error} ({free}); what was saved before is kept")


# ------------------------------------------------------------------------------------------------------------- loading
def load(path: Path) -> dict[str, Any]:
    """The payload of a file that `save` wrote, its digest verified. Raises CheckpointError."""
    payload = read(path)
    if not isinstance(payload, dict) or "digest" not in payload:
        raise CheckpointError(f"{path} is no checkpoint of this program (it has no digest)")
    expected = payload.pop("digest")
    try:
        actual = digest(payload)
    except TypeError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if actual != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return payload


def load_latest(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint of a run that is whole, and warnings about newer ones that are not.

    None if there is none at all. Raises CheckpointError if there are some and none of them loads, since a run never
    starts over by itself; and if one cannot be read, which may pass. A damaged `last.pt` is set aside, so that it
    cannot become the `previous.pt` of the next save.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = directory / name
        if not os.path.lexists(path):
            continue
        try:
            payload = load(path)
        except CheckpointError as error:
            if isinstance(error, CannotReadError) and path.exists():  # it may be whole
                older = name == LAST and os.path.lexists(directory / PREVIOUS)
                remedy = f", or remove it if that lasts: {PREVIOUS} is the one before" if older else ""
                raise CannotReadError(f"{error}; try again{remedy}") from None
            problems.append(str(error))
            continue
        if problems:
            os.replace(directory / LAST, directory / f"{LAST}.damaged")
            problems = [f"{p}; continuing from {PREVIOUS}" for p in problems]
        return payload, problems
    if problems:
        raise CheckpointError(f"no checkpoint of {directory} loads: {'; '.join(problems)}; --fresh starts over")
    return None, []


# ------------------------------------------------------------------------------------------------ weights into networks
def apply_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads `weights` into `network`, every key and shape as it must be. Raises CheckpointError naming what differs.

    Lenient in two things that carry no information: BatchNorm's batch counters may be missing, and the
    `select.indexes` of pruned-network DenseNets are dropped. Weights that are not finite are refused.
    """
    own = network.state_dict()
    given = {k: v for k, v in weights.items() if not k.endswith("select.indexes")}
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in own]
    shapes = [k for k in given if k in own and given[k].shape != own[k].shape]
    if missing or extra:
        problems = [*_listed("lacks", missing), *_listed("has", extra)]
        raise CheckpointError(f"{source} does not fit the architecture: it {' and '.join(problems)}")
    if shapes:
        pairs = [f"{k} {tuple(given[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes]
        fit = f"{source} does not fit the architecture or the number of classes"
        raise CheckpointError(f"{fit}: it {_listed('has', pairs)[0]}")
    bad = [k for k, v in given.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"{source} has weights that are not finite: {_listed('in', bad)[0]}")
    state = OrderedDict(given)
    state._metadata = own._metadata  # type: ignore[attr-defined]  # versions of modules, for those that ask
    network.load_state_dict(state, strict=False)


def _listed(verb: str, names: list[str]) -> list[str]:
    """[`lacks a, b, c and 2 more`], or [] without names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{verb} {', '.join(names[:3])}{more}"] if names else []
