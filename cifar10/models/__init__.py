"""CIFAR networks by name, for 32x32 images; state_dict keys and function agree with the reference definitions.

To add one: write `@MODELS.register def my_network(num_classes: int) -> nn.Module` in a file of this folder. It is
found, and the contract tests pick it up, by themselves. ImageNet's networks (imagenet/models.py) can be trained on
small images as well, and teach them: each of them enlarges the images to its own size.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.classes import class_names
from cifar10.models.efficientnet import EfficientNet
from cifar10.models.registry import CIFAR_INPUT, MODELS
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.models import network as networks
from distill.models.class_order import ClassNames
from distill.models.classifier import Classifier
from distill.models.network import Network, torchvision_weights
from distill.models.weights import Weights

__all__ = ["CIFAR_INPUT", "MODELS", "build_student", "find", "find_trained", "resolve"]

PHOTOS = "imagenet:"  # before names that CIFAR's own networks have too: imagenet:resnet18
ENLARGED = 96  # pixels that ImageNet's networks see of a small image, unless loaded otherwise

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def resolve(name: str) -> str:
    """The spelling of `name` in files: of a CIFAR network, else of one of ImageNet's. Raises UserError for neither."""
    return _find(name).arch


def find(name: str, image_size: int | None = None, weights: str | None = None) -> Network:
    """The network called `name`; one of ImageNet's sees images enlarged to `image_size`, 96 by default.

    weights: which of those that torchvision has for it. Raises UserError for an unknown name, and for another size or
    weights of a CIFAR network, which sees 32 pixels and has none.
    """
    network = _find(name, weights)
    if network.spec is not CIFAR_INPUT:
        return network.at(image_size or ENLARGED)
    if image_size not in (None, CIFAR_INPUT.size) or weights:
        raise UserError(
            f"--image-size and --weights (but raw and ema) are for ImageNet's networks: {network.arch} here sees 32x32 "
            f"images{_hint(network.arch)}"
        )
    return network


def _find(name: str, weights: str | None = None) -> Network:
    """The network called `name`, one of ImageNet's at its own size: torchvision is loaded only for these."""
    if name in MODELS:
        return _small(MODELS.resolve(name))
    from imagenet import models as photos

    bare = name[len(PHOTOS) :] if name.lower().startswith(PHOTOS) else name
    if bare == name and not name.startswith("timm:") and not photos.is_known(name):
        MODELS.resolve(name)  # whoever mistypes a CIFAR network is loaded the names of those
    network = photos.find(bare, weights)
    return replace(network, arch=f"{PHOTOS}{network.arch}") if network.arch in MODELS else network


def _small(arch: str) -> Network:
    """A network for 32x32 images, by its name in MODELS."""

    def build(num_classes: int, dropout: float | None = None, drop_connect: float | None = None) -> nn.Module:
        network = MODELS.build(arch, num_classes)
        if isinstance(network, EfficientNet):
            network.set_dropout(dropout, drop_connect or 0.0)
        elif dropout or drop_connect:
            raise UserError(f"--dropout and --drop-connect: {arch} has neither; efficientnet_b0 has both")
        return network

    def fetch(by_hand: str) -> Any:
        raise UserError(f"{arch} for 32x32 images has no published ImageNet weights{_hint(arch)}; {by_hand}")

    return Network(arch, CIFAR_INPUT, build, fetch)


def find_trained(
    name: str, loaded: Weights | None, image_size: int | None = None, weights: str | None = None
) -> Network:
    """find(), at the size and with the look that `loaded` was trained for where it is of a checkpoint of ours."""
    size = loaded.spec.size if loaded and loaded.spec and name not in MODELS else None
    return find(name, image_size or size, weights).shown(loaded)


def build_student(
    recipe: Recipe,
    classes: Sequence[str],
    options: Options,
    device: torch.device,
    examples: Tensor | None = None,
) -> tuple[Classifier, str | None]:
    """networks.build_student of the network that `recipe` names, at its size, for the data's `classes`."""
    network = find(recipe.arch, recipe.image_size, torchvision_weights(recipe.weights))
    if network.spec is not CIFAR_INPUT:
        print(f"{network.arch}: sees the images enlarged to {network.spec.size} pixels")

    def named(_: Weights) -> ClassNames:
        return class_names(classes, options.class_order)

    return networks.build_student(network, recipe, named, options, device, examples)


def _hint(arch: str) -> str:
    from imagenet import models as photos

    return f"; {PHOTOS}{photos.find(arch).arch} is ImageNet's" if photos.is_known(arch) else ""
