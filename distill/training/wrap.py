"""The model that a run trains: wrapped for several processes or GPUs and torch.compile, averaged, checkpointed."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.features.connected import Connected
from distill.files import checkpoint
from distill.models.classifier import Classifier
from distill.models.probe import check_size, unreached, wants_two
from distill.parallel.devices import replicas, wrap_inference
from distill.parallel.processes import broadcast_buffers, rank, world_size
from distill.training.optim import WeightAverage


class TrainedModel:
    """The model that a run trains, in the forms that a run needs.

    `student` is evaluated and exported. `module` is all that learns: the student, or the student with its connectors.
    `wrapped` is the module as a training step calls it. `average` is that of the student's weights, if there is one.
    """

    def __init__(
        self,
        student: Classifier,
        connected: Connected | None,
        recipe: Recipe,
        device_name: str,
        memory: nn.Module | None = None,
    ) -> None:
        """connected: the student with its connectors, where a loss has some. memory: what a loss remembers."""
        self.student, self.connectors = student, connected.connectors if connected else None
        self.memory = memory
        self.module: nn.Module = connected or student
        self.device = student.mean.device
        check_batch_norm(self.module, recipe.arch, recipe, device_name)
        self.wrapped = wrap_parallel(self.module, self.device, recipe, device_name)
        self.average = WeightAverage(student, recipe.ema) if recipe.ema else None

    @property
    def evaluated(self) -> Classifier:
        """The network whose accuracy counts: the average where there is one."""
        return self.average.network if self.average else self.student

    def train(self, size: int | None) -> None:
        """Goes to train mode; `size`: pixels that the student sees in training, if not its own."""
        self.wrapped.train()
        self.student.training_size = size

    def adds_up(self, last: bool) -> AbstractContextManager[None]:
        """Lets gradients of micro-batches add up in each process: DistributedDataParallel averages them at the last."""
        local = isinstance(self.wrapped, DistributedDataParallel) and not last
        return self.wrapped.no_sync() if local else nullcontext()  # type: ignore[operator]

    def is_finite(self) -> bool:
        """Returns whether all weights and running statistics are, those that rank 0 has. Waits for the device once."""
        broadcast_buffers(self.module)
        floating = [value for value in self.module.state_dict().values() if value.is_floating_point()]
        return bool(torch.stack([torch.isfinite(value).all() for value in floating]).all())

    def state_dict(self) -> dict[str, dict[str, Tensor] | None]:
        """Returns the weights of the student, its average and the connectors, and the memory; None for what is not."""
        return {name: None if part is None else part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Takes what state_dict() gave. Raises CheckpointError, which names `source`, and LookupError."""
        for name, part in self._parts().items():
            if part is not None:
                checkpoint.apply_weights(part, state[name], source)

    def _parts(self) -> dict[str, nn.Module | None]:
        average = self.average.network.network if self.average else None
        parts = {"student": self.student.network, "average": average, "connectors": self.connectors}
        return {**parts, "memory": self.memory} if self.memory is not None else parts


def wrap_parallel(network: nn.Module, device: torch.device, recipe: Recipe, device_name: str) -> nn.Module:
    """`network`, on `device`, as a training step calls it: the same parameters, on all processes or GPUs.

    Several processes: DistributedDataParallel, where the BatchNorm statistics of rank 0 count, unless they are common
    ones by `sync_bn`. One process that has several devices: DataParallel, where those of the first device count.
    `compile` as well. Raises UserError for what cannot be had.
    """
    check_machine(device, recipe, device_name)
    if recipe.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]  # of its children
    step = _compile(network, device, recipe) if recipe.compile else network
    if world_size() > 1:
        # Otherwise, and with static_graph, it regroups the gradients after the first step of each start: from three
        # processes on, sums in another order, so that a run that is continued ends in other bits (torch 2.15). Where it
        # does find parameters without a gradient it waits for the GPU in each step: so it is not told of them.
        here = [device] if device.type == "cuda" else None
        idle = unreached(network)
        for parameter in idle:
            parameter.requires_grad_(False)
        try:
            wrapped = DistributedDataParallel(step, here, find_unused_parameters=True, gradient_as_bucket_view=True)
        finally:
            for parameter in idle:
                parameter.requires_grad_()
        # nobody reads running statistics while it trains; evaluation and saving take those of rank 0
        wrapped.broadcast_buffers = False
        return wrapped
    return step if recipe.compile else wrap_inference(network, device, device_name)


def check_batch_norm(
    network: nn.Module, arch: str, recipe: Recipe, device_name: str, work: Callable[[Tensor], Any] | None = None
) -> None:
    """Raises UserError if `network` cannot be trained on the parts of a batch that are computed at a time.

    It must see images of the smallest size that it is shown; and no BatchNorm may get one value a channel from the
    smallest part, of a process, a GPU of DataParallel, or --accumulate. work: as for probe.wants_two.
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


def check_machine(device: torch.device, recipe: Recipe, device_name: str) -> None:
    """Raises UserError for what --sync-bn and --compile want and this machine does not have."""
    several = world_size() == 1 and replicas(device_name) > 1
    if recipe.sync_bn and (device.type != "cuda" or several):
        raise UserError("--sync-bn takes CUDA and a process for each GPU: NPROC=2 bash scripts/...")
    if recipe.compile and several:
        raise UserError("--compile takes one GPU, --device cuda:0, or a process for each: NPROC=2 bash scripts/...")
    if recipe.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        raise UserError("--compile needs a C++ compiler such as g++, which is not on the PATH")


def _compile(network: nn.Module, device: torch.device, recipe: Recipe) -> nn.Module:
    print("compiling the student: the first step takes a minute or so")
    # CUDA graphs take the launches of many small kernels off the CPU; DistributedDataParallel's hooks stand between.
    # In a graph's memory the gradients of one part would not outlive the forward pass of the next.
    graphs = device.type == "cuda" and world_size() == 1 and recipe.accumulate == 1
    return torch.compile(network, mode="reduce-overhead" if graphs else None)  # type: ignore[return-value]
