"""What a network does in a step, found by trying a copy of it on black images: nothing of the run moves."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.registry import Classifier


def unreached(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that get no gradient from any image (of EfficientNet's first block on small images). network: takes
    uint8 images and has their size in the spec of a Classifier in it; it is left as it is."""
    trial = copy.deepcopy(network).train()
    found = _shown(trial, trial, 2)
    logits, features = found if isinstance(found, tuple) else (found, [])
    learned = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    total = torch.stack([part.sum() for part in (logits, *features)]).sum()
    gradients = torch.autograd.grad(total, learned, allow_unused=True)
    own = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [parameter for parameter, gradient in zip(own, gradients, strict=True) if gradient is None]


@torch.no_grad()
def wants_two(network: nn.Module, work: Callable[[Tensor], Any] | None = None) -> bool:
    """Whether `network` cannot be trained on one image at a time: a BatchNorm of it has one value a channel then.

    network: as for `unreached`. work: what is done with images in its place, if that leaves everything as it is.
    """
    try:
        _shown(network, work or copy.deepcopy(network).train(), 1)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return True
    return False


def _shown(network: nn.Module, work: Callable[[Tensor], Any], count: int) -> Any:
    """What `work` makes of `count` black images of the size of `network`. Torch's generators stay as they are."""
    classifier = next(module for module in network.modules() if isinstance(module, Classifier))
    size, device = classifier.spec.size, classifier.mean.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return work(torch.zeros(count, size, size, 3, dtype=torch.uint8, device=device))
