"""Devices, precision and seeds."""

import os
from contextlib import AbstractContextManager

import torch

from distill.recipe import UserError


def choose_device(name: str, *, deterministic: bool = False) -> torch.device:
    """`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:N`. Raises UserError if it is not there.

    `deterministic`: only algorithms that give the same bits each time; an operation that has none raises. On the CPU
    the operations of this repository are so in any case.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return device


def describe_device(device: torch.device) -> str:
    """`NVIDIA H200`, or `cpu, 2 threads`: bit-identity on the CPU holds for one number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on the CPU, where bfloat16 pays on few processors.

    float32 on CUDA means float32: torch's default for convolutions is TF32, with 10 bits of mantissa.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "float32" and device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Convolutions and matrix products in `precision`; off for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators that a run draws from (dropout, initialisation)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to `states`; the CUDA one only where both sides have it."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
