"""Devices, precision, and a network on several of them."""

import ctypes
import hashlib
import math
import os
import signal
import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DataParallel

from distill.config.environment import Ranks, announced, cores, find_ranks, not_met
from distill.errors import UserError
from distill.parallel.processes import local_rank, patient_group, rank, world_size


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
    ranks = find_ranks()
    if sys.platform == "linux" and (ranks.world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ):
        # a launcher that is killed takes its processes along: they save and end
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if ranks.world_size > 1 and device.type == "cuda":
        if ranks.local_rank >= len(here):
            raise UserError(f"{ranks.local_rank + 1} or more processes for {len(here)} CUDA devices: lower NPROC")
        if len(set(here)) < len(here):
            raise UserError(f"--device {name}: each of several processes wants a device of its own")
        device = here[ranks.local_rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL starts; and for what torch asks of the current GPU
    if ranks.world_size > 1 and not dist.is_initialized():
        _join(ranks, device)
    return device


def _join(ranks: Ranks, device: torch.device) -> None:
    """Meet the other processes of the run. From then on rank 0 prints for all of them."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = f"the {ranks.world_size} processes of the run to meet at {where}; this is process {ranks.rank}"
    try:
        with announced(others):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            patient_group()
    except (dist.DistError, ValueError) as error:  # ValueError: of a port that is out of range
        raise not_met(others, os.environ["MASTER_PORT"], error) from None
    if ranks.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 for as long as this process lives


def _limit_threads() -> None:
    """As many threads as there are cores to use: torch knows the affinity of a process, and no quota of its cgroup."""
    if not os.environ.get("OMP_NUM_THREADS") and cores() < torch.get_num_threads():
        torch.set_num_threads(cores())


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep large blocks that are freed.

    By default the system gives them anew in each step, page by page: a fifth of a step's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other libraries have other ways
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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


def wrap_inference(network: nn.Module, device: torch.device, device_name: str) -> nn.Module:
    """`network` as it is called where there are no gradients: each process has its own, on all GPUs of one process."""
    here = devices(device_name) if world_size() == 1 else []
    if device.type == "cuda" and len(here) > 1:
        return DataParallel(network, here)
    return network


def replicas(device_name: str) -> int:
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
    if name == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16():
        _say_slow()
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@cache
def multiplies_bfloat16() -> bool:
    """Returns whether oneDNN has bfloat16 on this CPU, emulated or not; elsewhere torch computes it far slower."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())


@cache
def _say_slow() -> None:
    print("note: on this processor bfloat16 takes several times as long as float32")


def choose_teacher_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, and on a CPU that multiplies it in hardware; else float32."""
    if name == "auto" and device.type == "cpu":
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        name = "bfloat16" if able.get("amx_bf16") or able.get("avx512_bf16") else "float32"
    return choose_precision(name, device)


def seed_generators(seed: int, device_name: str) -> None:
    """Seeds torch's generators for a run.

    Rank 0 has `seed`; other ranks, and further GPUs of one process, have numbers of their own (the CPU's uses 32 bits).
    """
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


def images_at_once(most: int, size: int) -> int:
    """Returns how many images of `size` pixels are computed at once where `most` of up to 224 pixels are.

    A power of two, of about as many pixels, at least 16. most: a power of two.
    """
    return max(16, 1 << int(math.log2(most * min(1.0, (224 / size) ** 2))))


def generator_states(device_name: str) -> dict[str, Tensor]:
    """The states of torch's generators that a run draws from (dropout, initialisation)."""
    states = {"cpu": torch.get_rng_state()}
    for k, device in enumerate(_own_devices(device_name)):
        if device.type == "cuda":
            states[f"cuda{k or ''}"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Tensor], device_name: str) -> None:
    """Sets the generators to `states`; those of CUDA only where both sides have them."""
    torch.set_rng_state(states["cpu"])
    for k, device in enumerate(_own_devices(device_name)):
        if device.type == "cuda" and f"cuda{k or ''}" in states:
            torch.cuda.set_rng_state(states[f"cuda{k or ''}"], device)
