"""The optimiser, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from distill.recipe import Recipe


def learning_rate(step: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """The learning rate of step 0, 1, ..., epochs * steps_per_epoch - 1.

    Warm-up: lr * (step + 1) / W over W steps. Then with p in [0, 1), the share of the remaining steps that is done:
    cosine lr * (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts), constant lr,
    multistep lr, lr / 10 and lr / 100 from 50 % and 75 % of the whole run on.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup * steps_per_epoch), total // 4)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "cosine":
        return recipe.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    if recipe.schedule == "multistep":
        return recipe.lr * 0.1 ** ((step >= total * 0.5) + (step >= total * 0.75))
    return recipe.lr


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; weight decay on matrices and kernels, on vectors only with `decay_all`.

    Fused: three times faster than the default on a CPU, and the only form that leaves out an update when a flag on
    the device says so, without a synchronisation (engine.py).
    """
    weights = [p for p in network.parameters() if p.dim() > 1 or recipe.decay_all]
    vectors = [p for p in network.parameters() if p.dim() <= 1 and not recipe.decay_all]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
