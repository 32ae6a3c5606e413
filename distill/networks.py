"""A network that a name stands for: how it is built, what it wants to see, where its published weights come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill import checkpoint
from distill.errors import UserError
from distill.parallel import choose_precision, first_here, on_main
from distill.recipe import Recipe
from distill.registry import Classifier, InputSpec


@dataclass(frozen=True)
class Network:
    """A network that a name stands for.

    build(num_classes=, dropout=, drop_connect=, image_size=): freshly initialised; a setting that is not given, or is
    None, is the network's own. TypeError for a setting that it does not have.
    fetch(by_hand): its published weights. Raises UserError that ends with `by_hand` when they cannot be had.
    adapt: published or saved weights -> the same under the names that the network has today.
    """

    arch: str
    spec: InputSpec
    build: Callable[..., nn.Module]
    fetch: Callable[[str], Mapping[str, Tensor]]
    adapt: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict

    def at(self, size: int | None) -> "Network":
        """The same for images of another size, if one is given. Raises UserError when it is built, if it has none."""
        if not size or size == self.spec.size:
            return self

        def build(num_classes: int, **given: Any) -> nn.Module:
            try:
                return self.build(num_classes=num_classes, image_size=size, **given)
            except (AssertionError, ValueError, RuntimeError) as error:
                cause = " ".join(str(error).split())[:120]
                raise UserError(f"{self.arch} cannot be built for images of {size} pixels: {cause}") from None

        resized = round(self.spec.resized * size / self.spec.size)
        return replace(self, spec=replace(self.spec, size=size, resized=resized), build=build)


def build_student(
    network: Network,
    recipe: Recipe,
    num_classes: int,
    init: str | None,
    device: torch.device,
    examples: Tensor | None = None,
) -> tuple[Classifier, str | None]:
    """The network of `recipe`, initialised from its seed, from the file `init` or, if `pretrained`, from its published
    weights; and the digest of those weights. Where they are of other classes the network's last layer is fresh.

    examples: training images uint8 (N, H, W, 3), for a network that starts from their statistics: one with a method
    `initialise(images)` that takes them normalised, float32 (N, 3, H, W).
    """
    torch.manual_seed(recipe.seed)
    given = {"dropout": recipe.dropout, "drop_connect": recipe.drop_connect}
    try:
        built = network.build(num_classes, **{key: value for key, value in given.items() if value is not None})
    except TypeError:
        raise UserError(f"--dropout, --drop-connect: {network.arch} does not have what is given") from None
    for module in built.modules():
        if isinstance(module, _BatchNorm) and recipe.bn_momentum is not None:
            module.momentum = recipe.bn_momentum
    init_digest = None
    if init or recipe.pretrained:
        source = init or f"the published {network.arch}"
        by_hand = "or name them by --init FILE"
        weights = network.adapt(on_main(checkpoint.load_weights)(Path(init)) if init else fetch(network, by_hand))
        checkpoint.apply_weights(built, _with_own_head(built, weights, source), source)
        init_digest = checkpoint.digest(built.state_dict())
    student = Classifier(built, network.spec, choose_precision(recipe.precision, device))
    initialise: Callable[[Tensor], None] | None = getattr(built, "initialise", None)
    if initialise and init_digest is None and examples is not None:
        initialise(student.normalise(examples.cpu()))
    return student.to(device), init_digest


def fetch(network: Network, by_hand: str) -> Mapping[str, Tensor]:
    """The published weights of `network`: of several processes on a machine one downloads. Raises UserError."""
    with first_here():
        return network.fetch(by_hand)


def _with_own_head(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`weights`, with the network's own last layer where that has another number of classes."""
    own = network.state_dict()
    shared = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    heads = [key for key in shared if weights[key].dim() and weights[key].shape[1:] == own[key].shape[1:]]
    if heads:
        classes = sorted({len(weights[key]) for key in heads})
        new = f"{', '.join(heads)} are new"
        print(f"note: {source} knows {classes[0]} classes, the data has {len(own[heads[0]])}: {new}")
    return {**weights, **{key: own[key] for key in heads}}
