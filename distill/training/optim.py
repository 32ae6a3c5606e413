"""The optimiser, the learning rate as a pure function of the step, and the average of the weights."""

import copy
import math
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.config.recipe import Recipe

RESTART_EPOCHS = 10


def learning_rate(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """Returns the learning rate of step 0, 1, ..., epochs * steps_per_epoch - 1.

    Warm-up: lr * (step + 1) / W over W steps. Then with p in [0, 1), the share of the remaining steps that is done:
    cosine lr * (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2016, arXiv:1608.03983), constant lr,
    multistep lr, lr / 10 and lr / 100 from 50 % and 75 % of the whole run on, step lr * decay_rate^n in epochs
    n * decay_epochs to (n + 1) * decay_epochs of the run. restarts: the cosine every 10 epochs anew (SGDR, the same
    paper). onecycle (Smith and Topin 2017, arXiv:1708.07120, as torch's OneCycleLR without a cycle of the momentum):
    half a cosine from lr / 25 up to lr over 30 % of the run, then one down to lr / 250,000.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule == "onecycle":
        peak = 0.3 * total - 1
        if step <= peak:
            return _half_cosine(recipe.lr / 25, recipe.lr, step / peak)
        return _half_cosine(recipe.lr, recipe.lr / 25e4, (step - peak) / (total - 1 - peak))
    warmup = min(round(recipe.warmup * steps_per_epoch), total // 4)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "cosine":
        return _half_cosine(recipe.lr, 0.0, (step - warmup) / (total - warmup))
    if recipe.schedule == "restarts":
        period = RESTART_EPOCHS * steps_per_epoch
        return _half_cosine(recipe.lr, 0.0, (step - warmup) % period / period)
    if recipe.schedule == "multistep":
        return recipe.lr * 0.1 ** ((step >= total * 0.5) + (step >= total * 0.75))
    if recipe.schedule == "step":
        return float(recipe.lr * recipe.decay_rate ** (step // (recipe.decay_epochs * steps_per_epoch)))
    return recipe.lr


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Returns the optimiser of the recipe: SGD with Nesterov momentum, AdamW, or RMSprop.

    AdamW: Loshchilov and Hutter 2017, arXiv:1711.05101; betas 0.9 and 0.999. RMSprop has EfficientNet's settings (Tan
    and Le 2019, arXiv:1905.11946: decay 0.9; TensorFlow's epsilon of 0.001 stands under the root, torch's beside it).
    Weight decay on matrices and kernels, on vectors (BatchNorm, biases) only with `decay_all`; the biases of BatchNorm
    learn at `bias_lr` times the rate (Jordan 2024, arXiv:2404.00498), which stands in their group as
    `lr_factor`, and decay no faster.
    Fused: three times faster than the default on a CPU, and the only form that leaves out an update when a flag on the
    device says so, without a synchronisation (engine.py). RMSprop has no such form.
    """
    fast = {id(module.bias) for module in network.modules() if isinstance(module, _BatchNorm) and recipe.bias_lr != 1}
    decays = (recipe.weight_decay, 0.0)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in decays]
    groups += [{"params": [], "weight_decay": d / recipe.bias_lr, "lr_factor": recipe.bias_lr} for d in decays]
    for parameter in network.parameters():
        vector = parameter.dim() <= 1 and not recipe.decay_all
        groups[vector + 2 * (id(parameter) in fast)]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr=recipe.lr, alpha=0.9, eps=0.001**0.5, momentum=recipe.momentum, foreach=True
        )
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)


Network = TypeVar("Network", bound=nn.Module)


class WeightAverage(Generic[Network]):
    """An exponential moving average of a network's weights and BatchNorm statistics, in a network of its own.

    After step n = 0, 1, ...: average += (1 - d) * (weights - average) with d = min(decay, (1 + n) / (10 + n)), so that
    the first steps, far from where training goes, are soon forgotten. Counters are copied.
    """

    def __init__(self, source: Network, decay: float) -> None:
        self.network = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(self.network.state_dict().values(), source.state_dict().values(), strict=True))
        self._floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the source, as it is after `step`."""
        keep = min(self.decay, (1 + step) / (10 + step))
        averages, values = zip(*self._floating, strict=True)
        torch._foreach_lerp_(averages, values, 1 - keep)
        if self._counters:
            counters, values = zip(*self._counters, strict=True)
            torch._foreach_copy_(counters, values)
