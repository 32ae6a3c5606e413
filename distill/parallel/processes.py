"""Several processes, here or on many machines, as one run: rank, world size, collectives.

A launcher (torchrun) starts the same command in n processes. Each trains on its part of every batch and evaluates its
part of the test images; gradients are averaged, counts summed. Files are the business of rank 0 alone (`on_main`).
With one process everything here does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from distill.config.environment import find_ranks
from distill.errors import UserError

P = ParamSpec("P")


Result = TypeVar("Result")


@contextmanager
def leaving() -> Iterator[None]:
    """Leaves the other processes after good work, also if --steps has ended it; after an error the launcher ends them.

    An interpreter that ends while it is still connected may abort, code 134 (torch 2.15 and before). Who had met them
    before goes on with them: to meet a second time at the same port may wait for ever, as a process may still find the
    first store there.
    """
    met_before = dist.is_initialized()
    try:
        yield
    except UserError as error:
        if not error.exit_code and not met_before:
            _leave()
        raise
    if not met_before:
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        any_of(False)  # rank 0 has the listening socket, and must not go first
        dist.destroy_process_group()
        patient_group.cache_clear()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return find_ranks().local_rank


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world size), as EpochPlan and test data take it."""
    return rank(), world_size()


def on_main(work: Callable[P, Result]) -> Callable[P, Result]:
    """Decorator: the function runs on rank 0 alone. What it returns, or the UserError it raises, every rank gets."""

    @wraps(work)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        if world_size() == 1:
            return work(*args, **kwargs)
        outcome: list[Any] = [None, None]
        if rank() == 0:
            try:
                outcome[0] = work(*args, **kwargs)
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1]:
            outcome[1].already_reported = rank() > 0  # one line for all of them
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    return call


@cache
def patient_group() -> dist.ProcessGroup:
    """Returns the group in which processes wait for what one of them does, longer than a step of training may take.

    It is made as soon as all have met: to make it later would itself wait for a process that has ended since.
    """
    return dist.new_group(timeout=timedelta(days=1), backend="gloo")  # type: ignore[return-value]


def is_first_here() -> bool:
    """Whether this process is the first of its machine, or alone."""
    return world_size() == 1 or not local_rank()


def of_first_here(value: Result) -> Result:
    """Returns the `value` of the first process of this machine."""
    return value if world_size() == 1 else gather(value)[rank() - local_rank()]


@contextmanager
def first_here() -> Iterator[None]:
    """The first process of each machine enters alone, the others when it is done and has filled the caches.

    All leave together, however long that takes.
    """
    if world_size() == 1:
        yield
        return
    patient = patient_group()
    done = bool(local_rank())
    try:
        if not done:
            yield
            done = True
    finally:
        failed = torch.tensor([not done], dtype=torch.uint8)
        dist.all_reduce(failed, dist.ReduceOp.MAX, patient)  # type: ignore[arg-type]
    if failed.item():
        elsewhere = UserError("the first process of a machine has failed")
        elsewhere.already_reported = True
        raise elsewhere
    if local_rank():
        yield
    dist.all_reduce(failed, dist.ReduceOp.MAX, patient)  # type: ignore[arg-type]


def any_of(*flags: bool) -> list[bool]:
    """For each flag whether it is set on any rank. Every rank must come here."""
    if world_size() == 1:
        return list(flags)
    common = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(common, dist.ReduceOp.MAX)
    return [bool(flag) for flag in common]


def reduce(values: Tensor, how: str = "sum") -> Tensor:
    """`values` after sum or max over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return values


def gather(value: Result) -> list[Result]:
    """The `value` of each rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(values: Tensor) -> Tensor:
    """Returns the rows (B, ...) of all ranks, in their order; each rank has as many. Without a gradient."""
    if world_size() == 1:
        return values
    rows = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(rows, values.contiguous())
    return torch.cat(rows)


def broadcast_buffers(network: nn.Module) -> None:
    """BatchNorm statistics of rank 0 to all: those of the others saw other images."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
