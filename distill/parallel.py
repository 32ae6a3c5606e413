"""Devices and precision; several GPUs in one process; several processes, here or on many machines, as one run.

A launcher (torchrun) starts the same command in n processes. Each trains on its share of every batch and evaluates its
share of the test images; gradients are averaged, counts summed. Files are the business of rank 0 alone (`on_main`).
With one process everything here does nothing.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distill.errors import UserError
from distill.machine import Place, announced, cores, find_place, not_met
from distill.recipe import Recipe
from distill.trial import check_size, unreached, wants_two

P = ParamSpec("P")
Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------------------------- devices
def start(name: str, *, deterministic: bool = False) -> torch.device:
    """The device of this process, after it has joined the other processes of its run, if a launcher started several.

    name: as for `devices`; with several processes on CUDA each takes the GPU of its local rank.
    deterministic: only algorithms that give the same bits each time; an operation that has none raises. On the CPU the
    operations of this repository are so in any case. Raises UserError if the device is not there.
    """
    here = devices(name)
    device = here[0]
    _keep_freed_memory()
    _limit_threads()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # otherwise each new tensor is filled with NaN before its use
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    place = find_place()
    if place.world_size > 1 and device.type == "cuda":
        if place.local_rank >= len(here):
            raise UserError(f"{place.local_rank + 1} or more processes for {len(here)} CUDA devices: lower NPROC")
        if len(set(here)) < len(here):
            raise UserError(f"--device {name}: each of several processes wants a device of its own")
        device = here[place.local_rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL starts; and for what torch asks of the current GPU
    if place.world_size > 1 and not dist.is_initialized():
        _join(place, device)
    return device


def _join(place: Place, device: torch.device) -> None:
    """Meet the other processes of the run. From then on rank 0 prints for all of them."""
    if sys.platform == "linux":  # a launcher that is killed takes its processes along: they save and end
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = f"the {place.world_size} processes of the run to meet at {where}; this is process {place.rank}"
    try:
        with announced(others):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (dist.DistError, ValueError) as error:  # ValueError: of a port that is out of range
        raise not_met(others, os.environ["MASTER_PORT"], error) from None
    if place.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 for as long as this process lives


def _limit_threads() -> None:
    """As many threads as there are cores to use: torch knows the affinity of a process, and no quota of its cgroup."""
    if not os.environ.get("OMP_NUM_THREADS") and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep large blocks that are freed. By default the system gives them anew in each step, page by
    page: a fifth of a step's time on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other libraries have other ways
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def leave() -> None:
    """Leave the other processes, after good work: after an error the launcher ends them."""
    if dist.is_initialized():
        any_of(False)  # rank 0 has the listening socket, and must not go first
        dist.destroy_process_group()


def devices(name: str) -> list[torch.device]:
    """`auto` (all visible GPUs, or the CPU), `cpu`, `cuda` (all visible GPUs), `cuda:N`, `cuda:N,M,...` (these).

    Raises UserError if one of them is not there.
    """
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return [torch.device("cpu")]
    if name in ("auto", "cuda"):
        numbers = [str(k) for k in range(max(count, 1))]
    else:
        numbers = name.removeprefix("cuda:").split(",") if name.startswith("cuda:") else []
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N or cuda:N,M, got {name!r}")
    if max(map(int, numbers)) >= count:
        raise UserError(f"--device {name}: this machine has {count} CUDA devices")
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} cannot use this machine's GPUs: its driver is too old for it? --device cpu"
        )
    return [torch.device("cuda", int(number)) for number in numbers]


def spread(network: nn.Module, device: torch.device, recipe: Recipe, device_name: str) -> nn.Module:
    """`network`, on `device`, as a training step calls it: the same parameters, on all processes or GPUs.

    Several processes: DistributedDataParallel, where the BatchNorm statistics of rank 0 count, unless they are common
    ones by `sync_bn`. One process that has several devices: DataParallel, where those of the first device count.
    `compile` as well. Raises UserError for what cannot be had.
    """
    if recipe.sync_bn:
        if device.type != "cuda" or (world_size() == 1 and shares(device_name) > 1):
            raise UserError("--sync-bn takes CUDA and a process for each GPU: NPROC=2 bash scripts/...")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]  # of its children
    step = _compile(network, device, recipe, device_name) if recipe.compile else network
    if world_size() > 1:
        # Otherwise, and with static_graph, it regroups the gradients after the first step of each start: from three
        # processes on, sums in another order, so that a run that is continued ends in other bits (torch 2.15). Where it
        # does find parameters without a gradient it waits for the GPU in each step: so it is not told of them.
        here = [device] if device.type == "cuda" else None
        idle = unreached(network)
        for parameter in idle:
            parameter.requires_grad_(False)
        try:
            return DistributedDataParallel(step, here, find_unused_parameters=True)
        finally:
            for parameter in idle:
                parameter.requires_grad_()
    return step if recipe.compile else spread_inference(network, device, device_name)


def check_batch_norm(
    network: nn.Module, arch: str, recipe: Recipe, device_name: str, work: Callable[[Tensor], Any] | None = None
) -> None:
    """Raises UserError if `network` cannot see images of the smallest size that it is shown, or if a BatchNorm of it
    gets one value a channel from the smallest part of a batch that is computed at a time, by a process, by a GPU of
    DataParallel, or by --accumulate. work: as for trial.wants_two."""
    smallest_size = min(filter(None, map(recipe.size_at, range(recipe.epochs))), default=None)
    if work is None and (smallest_size or recipe.image_size):
        check_size(network, arch, "--sizes" if smallest_size else "--image-size", smallest_size)
    parts = shares(device_name)
    images = recipe.batch_size // recipe.accumulate
    per_part = -(-images // parts)
    smallest = images - (-(-images // per_part) - 1) * per_part  # DataParallel's last GPU gets what is left
    if smallest > 1 or (recipe.sync_bn and world_size() > 1) or not wants_two(network, work, smallest_size):
        return
    split = [f"in {recipe.accumulate} parts of --accumulate"] * (recipe.accumulate > 1)
    split += [f"over {parts} {'processes' if world_size() > 1 else 'GPUs'}"] * (parts > 1)
    size = " ".join([f"--batch-size {recipe.batch_size}", " and ".join(split)]).strip()
    least = f"--batch-size {2 * parts * recipe.accumulate} is the least"
    line = f"{size} is one image at a time, of which a BatchNorm of {arch} has one value a channel: {least}"
    error = UserError(line)
    error.told = rank() > 0
    raise error


def _compile(network: nn.Module, device: torch.device, recipe: Recipe, device_name: str) -> nn.Module:
    if world_size() == 1 and shares(device_name) > 1:
        raise UserError("--compile takes one GPU, --device cuda:0, or a process for each: NPROC=2 bash scripts/...")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        raise UserError("--compile needs a C++ compiler such as g++, which is not on the PATH")
    print("compiling the student: the first step takes a minute or so")
    # CUDA graphs take the launches of many small kernels off the CPU; DistributedDataParallel's hooks stand between.
    # In a graph's memory the gradients of one part would not outlive the forward pass of the next.
    graphs = device.type == "cuda" and world_size() == 1 and recipe.accumulate == 1
    return torch.compile(network, mode="reduce-overhead" if graphs else None)  # type: ignore[return-value]


def spread_inference(network: nn.Module, device: torch.device, device_name: str) -> nn.Module:
    """`network` as it is called where there are no gradients: each process has its own, on all GPUs of one process."""
    here = devices(device_name) if world_size() == 1 else []
    if device.type == "cuda" and len(here) > 1:
        return DataParallel(network, here)
    return network


def shares(device_name: str) -> int:
    """The parts that a batch is divided into, each with BatchNorm statistics of its own: a run's `world_size`."""
    return world_size() if world_size() > 1 else len(devices(device_name))


def describe_device(device: torch.device) -> str:
    """`NVIDIA H200`, or `cpu, 2 threads`: bit-identity on the CPU holds for one number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, and float32 on the CPU, where bfloat16 pays on few processors.

    float32 on CUDA means float32: torch's default for convolutions is TF32, with 10 bits of mantissa.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if fast else "float32"
    if name == "float32" and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_teacher_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, and on a CPU that multiplies it in hardware; else float32."""
    if name == "auto" and device.type == "cpu":
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        name = "bfloat16" if able.get("amx_bf16") or able.get("avx512_bf16") else "float32"
    return choose_precision(name, device)


# ----------------------------------------------------------------------------------------------------------- processes
def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return find_place().local_rank


def share() -> tuple[int, int]:
    """(rank, world size), as EpochPlan and EvaluationSet take it."""
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
            outcome[1].told = rank() > 0  # one line for all of them
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    return call


@contextmanager
def first_here() -> Iterator[None]:
    """The first process of each machine enters alone, the others when it is done and has filled the caches."""
    if world_size() == 1:
        yield
        return
    # what the first one does may take longer than a collective of training should
    patient = dist.new_group(timeout=timedelta(days=1), backend="gloo")
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
        elsewhere.told = True
        raise elsewhere
    if local_rank():
        yield


def any_of(*flags: bool) -> list[bool]:
    """For each flag whether it is set on any rank. Every rank must come here."""
    if world_size() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found]


def reduce(values: Tensor, how: str = "sum") -> Tensor:
    """`values` after sum or max over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how])
    return values


def gather(value: Result) -> list[Result]:
    """The `value` of each rank, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def share_buffers(network: nn.Module) -> None:
    """BatchNorm statistics of rank 0 to all: those of the others saw other images."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


# ---------------------------------------------------------------------------------------------------------- generators
def seed_generators(seed: int, device_name: str) -> None:
    """Seed torch's generators: rank 0 with `seed`, other ranks, and further GPUs of one process, with numbers of their
    own (the CPU's uses 32 bits)."""
    torch.manual_seed(_own_seed(seed, rank()))
    for k, device in enumerate(_own_devices(device_name)[1:], start=1):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_own_seed(seed, k))


def _own_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "little") if number else seed


def _own_devices(device_name: str) -> list[torch.device]:
    """The devices whose generators this process draws from."""
    here = devices(device_name)
    return here[local_rank() : local_rank() + 1] if world_size() > 1 and len(here) > 1 else here


def generator_states(device_name: str) -> dict[str, Tensor]:
    """The states of torch's generators that a run draws from (dropout, initialisation)."""
    states = {"cpu": torch.get_rng_state()}
    for k, device in enumerate(_own_devices(device_name)):
        if device.type == "cuda":
            states[f"cuda{k or ''}"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Tensor], device_name: str) -> None:
    """Set the generators to `states`; those of CUDA only where both sides have them."""
    torch.set_rng_state(states["cpu"])
    for k, device in enumerate(_own_devices(device_name)):
        if device.type == "cuda" and f"cuda{k or ''}" in states:
            torch.cuda.set_rng_state(states[f"cuda{k or ''}"], device)
