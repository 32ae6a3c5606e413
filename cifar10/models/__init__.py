"""CIFAR networks by name, for 32x32 images; state_dict keys and function agree with the reference definitions.

To add one: write `@MODELS.register def my_network(num_classes: int) -> nn.Module` in a file of this folder and
import the file below. The contract tests pick it up by themselves.
"""

from pathlib import Path

import torch

from cifar10.models import densenet, efficientnet, mobilenetv2, resnet, resnext
from cifar10.models.registry import CIFAR_INPUT, MODELS
from distill import checkpoint
from distill.recipe import Recipe
from distill.registry import Classifier

__all__ = ["CIFAR_INPUT", "MODELS", "build_student", "densenet", "efficientnet", "mobilenetv2", "resnet", "resnext"]


def build_student(
    recipe: Recipe, num_classes: int, init: str | None, device: torch.device
) -> tuple[Classifier, str | None]:
    """The network of `recipe`, initialised from its seed or from the file `init`, and the digest of those weights."""
    torch.manual_seed(recipe.seed)
    network = MODELS.build(recipe.arch, num_classes)
    init_digest = None
    if init:
        weights = checkpoint.load_weights(Path(init))
        checkpoint.apply_weights(network, weights, init)
        init_digest = checkpoint.digest(network.state_dict())
    return Classifier(network, CIFAR_INPUT).to(device), init_digest
