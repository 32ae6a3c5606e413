"""A network that a name stands for: how it is built, what it wants to see, where its published weights come from."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.files import checkpoint
from distill.models import weights
from distill.models.class_order import ClassNames
from distill.models.classifier import Classifier, InputSpec
from distill.models.weights import Weights
from distill.parallel.devices import choose_precision
from distill.parallel.processes import first_here, on_main


@dataclass(frozen=True)
class Network:
    """A network that a name stands for.

    build(num_classes=, dropout=, drop_connect=, image_size=): freshly initialised; a setting that is not given, or is
    None, is the network's own. TypeError for a setting that it does not have.
    fetch(by_hand): its published weights. Raises UserError that ends with `by_hand` when they cannot be had.
    adapt: published or saved weights -> the same under the names that the network has today.
    plain: the same at its own size, where it is for images of another one.
    """

    arch: str
    spec: InputSpec
    build: Callable[..., nn.Module]
    fetch: Callable[[str], Mapping[str, Tensor]]
    adapt: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    plain: "Network | None" = None

    def at(self, size: int | None) -> "Network":
        """The same for images of another size, if one is given. Raises UserError when it is built, if it has none."""
        if not size or size == self.spec.size:
            return self
        plain = self.plain or self

        def build(num_classes: int, **given: Any) -> nn.Module:
            try:
                return plain.build(num_classes=num_classes, image_size=size, **given)
            except (AssertionError, ValueError, RuntimeError) as error:
                cause = " ".join(str(error).split())[:120]
                raise UserError(f"{self.arch} cannot be built for images of {size} pixels: {cause}") from None

        resized = round(plain.spec.resized * size / plain.spec.size)
        return replace(self, spec=replace(self.spec, size=size, resized=resized), build=build, plain=plain)

    def shown(self, loaded: Weights | None, mean: str | None = None, std: str | None = None) -> "Network":
        """The same with the normalisation that a file tells, or that is given."""
        return replace(self, spec=self.spec.with_look_of(loaded.spec if loaded else None).normalised(mean, std))


def build_student(
    network: Network,
    recipe: Recipe,
    classes: Callable[[Weights], ClassNames],
    options: Options,
    device: torch.device,
    examples: Tensor | None = None,
) -> tuple[Classifier, str | None]:
    """Returns the network of `recipe` as it is before training, and the digest of the weights it was given, if any.

    It is initialised from the recipe's seed, from the file --init or, if `pretrained`, from its published weights.
    Where these are of another number of classes the last layer is fresh.

    classes: those of the data, as they are compared with the weights that are given.
    examples: training images uint8 (N, H, W, 3), for a network that starts from their statistics: one with a method
    `initialise(images)` that takes them normalised, float32 (N, 3, H, W). Raises UserError.
    """
    if raw_or_ema(recipe.weights) and not options.init:
        raise UserError("--weights raw and ema are of a file: give --init FILE")
    if (named := torchvision_weights(recipe.weights)) and not recipe.pretrained and not options.init:
        raise UserError(f"--weights {named} is which of the published weights to start from: give --pretrained as well")
    loaded = on_main(weights.load)(Path(options.init), raw_or_ema(recipe.weights)) if options.init else None
    if options.evaluate and loaded and loaded.spec and network.spec.resized and not recipe.image_size:
        network = network.at(loaded.spec.size)
    weights.warn_of_origin(loaded, recipe.val_split, "student")
    network = network.shown(loaded, recipe.mean, recipe.std)
    names = classes(loaded or Weights("", {})).names
    torch.manual_seed(recipe.seed)
    built = _built(network, len(names), {"dropout": recipe.dropout, "drop_connect": recipe.drop_connect})
    for module in built.modules():
        if isinstance(module, _BatchNorm) and recipe.bn_momentum is not None:
            module.momentum = recipe.bn_momentum
    student = Classifier(built, network.spec, choose_precision(recipe.precision, device), names)
    if loaded and recipe.pretrained and not options.evaluate:
        print(f"note: {options.init} by --init is taken, not the published weights of --pretrained")
    if loaded or recipe.pretrained:
        loaded = loaded or fetch(network, "or name them by --init FILE")
        load_into(student, loaded, network, classes(loaded), new_head=not options.evaluate)
        return student.to(device), checkpoint.digest(built.state_dict())
    initialise: Callable[[Tensor], None] | None = getattr(built, "initialise", None)
    if initialise and examples is not None and len(examples):
        initialise(student.normalise(examples.cpu()))
    return student.to(device), None


def _built(network: Network, num_classes: int, settings: dict[str, float | None]) -> nn.Module:
    """The network with those of `settings` that are given; one of 0 may be of something that it does not have."""
    given = {key: value for key, value in settings.items() if value is not None}
    for left_out in (None, *(key for key, value in given.items() if not value)):
        with suppress(TypeError):
            kept = {key: value for key, value in given.items() if key != left_out}
            return network.build(num_classes=num_classes, **kept)
    if any(given.values()):
        raise UserError(f"--dropout, --drop-connect: {network.arch} does not have what is given")
    return network.build(num_classes=num_classes)


def load_into(
    classifier: Classifier, loaded: Weights, network: Network, classes: ClassNames, *, new_head: bool = False
) -> None:
    """weights.give to the network that `network` has built, under the names that it has today."""
    adapted = replace(loaded, state=network.adapt(loaded.state))
    weights.give(classifier, adapted, classes, lambda count: network.build(num_classes=count), new_head=new_head)


def fetch(network: Network, by_hand: str) -> Weights:
    """The published weights of `network`: of several processes on a machine one downloads. Raises UserError."""
    with first_here():
        return Weights(f"the published {network.arch}", network.fetch(by_hand), published=True)


def raw_or_ema(flag: str | None) -> str | None:
    """`raw` or `ema`, if --weights asks for one of the sets of weights in a file."""
    return flag.lower() if flag and flag.lower() in weights.WHICH else None


def torchvision_weights(flag: str | None) -> str | None:
    """The name of torchvision's weights, if --weights has one."""
    return None if raw_or_ema(flag) else flag
