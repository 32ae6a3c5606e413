"""Wrap the student for a training step: several processes or GPUs, torch.compile; and check that a batch suffices."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.models.probe import check_size, unreached, wants_two
from distill.parallel.devices import replicas, wrap_inference
from distill.parallel.processes import rank, world_size


def wrap_parallel(network: nn.Module, device: torch.device, recipe: Recipe, device_name: str) -> nn.Module:
    """`network`, on `device`, as a training step calls it: the same parameters, on all processes or GPUs.

    Several processes: DistributedDataParallel, where the BatchNorm statistics of rank 0 count, unless they are common
    ones by `sync_bn`. One process that has several devices: DataParallel, where those of the first device count.
    `compile` as well. Raises UserError for what cannot be had.
    """
    if recipe.sync_bn:
        if device.type != "cuda" or (world_size() == 1 and replicas(device_name) > 1):
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
    return step if recipe.compile else wrap_inference(network, device, device_name)


def check_batch_norm(
    network: nn.Module, arch: str, recipe: Recipe, device_name: str, work: Callable[[Tensor], Any] | None = None
) -> None:
    """Raises UserError if `network` cannot see images of the smallest size that it is shown, or if a BatchNorm of it
    gets one value a channel from the smallest part of a batch that is computed at a time, by a process, by a GPU of
    DataParallel, or by --accumulate. work: as for trial.wants_two.
    """
    smallest_size = min(filter(None, map(recipe.size_at, range(recipe.epochs))), default=None)
    if work is None and (smallest_size or recipe.image_size):
        check_size(network, arch, "--sizes" if smallest_size else "--image-size", smallest_size)
    parts = replicas(device_name)
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
    error.already_reported = rank() > 0
    raise error


def _compile(network: nn.Module, device: torch.device, recipe: Recipe, device_name: str) -> nn.Module:
    if world_size() == 1 and replicas(device_name) > 1:
        raise UserError("--compile takes one GPU, --device cuda:0, or a process for each: NPROC=2 bash scripts/...")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        raise UserError("--compile needs a C++ compiler such as g++, which is not on the PATH")
    print("compiling the student: the first step takes a minute or so")
    # CUDA graphs take the launches of many small kernels off the CPU; DistributedDataParallel's hooks stand between.
    # In a graph's memory the gradients of one part would not outlive the forward pass of the next.
    graphs = device.type == "cuda" and world_size() == 1 and recipe.accumulate == 1
    return torch.compile(network, mode="reduce-overhead" if graphs else None)  # type: ignore[return-value]
