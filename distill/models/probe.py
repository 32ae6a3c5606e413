"""What a network does in a step, found by trying a copy of it on black images: nothing of the run moves."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import UserError, out_of_memory
from distill.models.classifier import Classifier


def unreached(network: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that get no gradient from any image, as in EfficientNet's first block on small images.

    network: takes uint8 images and has their size in the spec of a Classifier in it; it is left as it is.
    """
    trial = copy.deepcopy(network).train()
    output = _shown(trial, trial, 2)
    logits, features = output if isinstance(output, tuple) else (output, [])
    learned = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    total = torch.stack([part.sum() for part in (logits, *features)]).sum()
    gradients = torch.autograd.grad(total, learned, allow_unused=True)
    own = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [parameter for parameter, gradient in zip(own, gradients, strict=True) if gradient is None]


@torch.no_grad()
def wants_two(network: nn.Module, work: Callable[[Tensor], Any] | None = None, size: int | None = None) -> bool:
    """Whether `network` cannot be trained on one image at a time: a BatchNorm of it has one value a channel then.

    network: as for `unreached`. work: what is done with images in its place, if that leaves everything as it is.
    size: pixels that it sees in training, if not its own.
    """
    trial = copy.deepcopy(network).train()
    next(module for module in trial.modules() if isinstance(module, Classifier)).training_size = size
    try:
        _shown(network, work or trial, 1)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return True
    return False


@torch.no_grad()
def check_size(network: nn.Module, arch: str, flag: str, size: int | None = None) -> None:
    """Raises UserError if `network` cannot see images of `size` pixels, or of its own size; `flag` is named.

    network: as for `unreached`.
    """
    trial = copy.deepcopy(network).eval()
    classifier = next(module for module in trial.modules() if isinstance(module, Classifier))
    seen = size or classifier.spec.size
    classifier.spec = replace(classifier.spec, size=seen)
    try:
        _shown(trial, trial, 2)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        if out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:120]
        raise UserError(f"{flag}: {arch} cannot see images of {seen} pixels ({cause})") from None


def _shown(network: nn.Module, work: Callable[[Tensor], Any], count: int) -> Any:
    """What `work` makes of `count` black images of the size of `network`. Torch's generators stay as they are."""
    classifier = next(module for module in network.modules() if isinstance(module, Classifier))
    size, device = classifier.spec.size, classifier.mean.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return work(torch.zeros(count, size, size, 3, dtype=torch.uint8, device=device))
