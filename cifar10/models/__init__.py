"""CIFAR networks by name, for 32x32 images; state_dict keys and function agree with the reference definitions.

To add one: write `@MODELS.register def my_network(num_classes: int) -> nn.Module` in a file of this folder. It is
found, and the contract tests pick it up, by themselves.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from cifar10.classes import class_names
from cifar10.models.efficientnet import EfficientNet
from cifar10.models.registry import CIFAR_INPUT, MODELS
from distill import checkpoint, weights
from distill.errors import UserError
from distill.parallel import choose_precision, on_main
from distill.recipe import Options, Recipe
from distill.registry import Classifier

__all__ = ["CIFAR_INPUT", "MODELS", "build_student"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def build_student(
    recipe: Recipe, classes: Sequence[str], options: Options, device: torch.device
) -> tuple[Classifier, str | None]:
    """The network of `recipe` for the data's `classes`, initialised from its seed or from the file --init, and the
    digest of those weights."""
    torch.manual_seed(recipe.seed)
    network = MODELS.build(recipe.arch, len(classes))
    if isinstance(network, EfficientNet):
        network.set_dropout(recipe.dropout, recipe.drop_connect or 0.0)
    elif recipe.dropout or recipe.drop_connect:
        raise UserError(f"--dropout and --drop-connect: {recipe.arch} has neither; efficientnet_b0 has both")
    given = on_main(weights.load)(Path(options.init), recipe.weights) if options.init else None
    spec = CIFAR_INPUT.as_told(given.spec if given else None).normalised(recipe.mean, recipe.std)
    student = Classifier(network, spec, choose_precision(recipe.precision, device), classes)
    if given:
        weights.give(student, given, class_names(classes, options.class_order), partial(MODELS.build, recipe.arch))
    return student.to(device), checkpoint.digest(network.state_dict()) if given else None
