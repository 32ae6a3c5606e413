"""A network with the normalisation that it carries along."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.depthwise import SmallMaps
from distill.options import channels


@dataclass(frozen=True)
class InputSpec:
    """What a network expects: a square of `size` pixels, and `mean`, `std` per channel of images in [0, 1].

    Photos are evaluated as its authors did: the short side to `resized` pixels by `interpolation` (with antialiasing),
    then the centre.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resized: int = 0  # 0 where images come as squares of `size`
    interpolation: str = "bilinear"

    def normalised(self, mean: str | None, std: str | None) -> "InputSpec":
        """With the values of --mean and --std, where they are given."""
        return replace(self, mean=channels(mean), std=channels(std)) if mean and std else self

    def with_look_of(self, other: "InputSpec | None") -> "InputSpec":
        """With the normalisation and interpolation of `other`, which a checkpoint may tell of."""
        return replace(self, mean=other.mean, std=other.std, interpolation=other.interpolation) if other else self

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Classifier(nn.Module):
    """A network that takes images as they travel, uint8 (B, H, W, 3) in [0, 255], and normalises them itself.

    Teacher and student may thus differ in normalisation, and a copy to the device is a quarter of the bytes. The
    normalisation is not in the state_dict of `network`, which therefore keeps the keys of the bare architecture.
    `classes`: what the outputs stand for, () where nobody says. `precision`: of convolutions and matrix products. It is
    chosen in here since DataParallel's threads would run an autocast of their caller in float16, whatever its type is.
    `training_size`: pixels that the images are resized to in training mode alone, None for the network's own size.
    `init_digest`: of the weights that it started from, None for random ones.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        network: nn.Module,
        spec: InputSpec,
        precision: torch.dtype = torch.float32,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.precision, self.classes = precision, tuple(classes)
        self.training_size: int | None = None
        self.init_digest: str | None = None
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.empty(1, 3, 1, 1), persistent=False)
        self.look(spec)

    def look(self, spec: InputSpec) -> None:
        """See images as `spec` says from now on."""
        self.spec = spec
        self.mean.copy_(255 * torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.scale.copy_(1 / (255 * torch.tensor(spec.std).view(1, 3, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 (B, H, W, 3) -> logits float32 (B, C)."""
        pixels = self.normalise(images)
        here = images.device.type
        lower = self.precision != torch.float32
        plain = here != "cpu" or lower or not torch.is_grad_enabled() or torch.compiler.is_compiling()
        with torch.autocast(here, dtype=self.precision, enabled=lower), nullcontext() if plain else SmallMaps():
            logits: Tensor = self.network(pixels)
        return logits.float()

    def normalise(self, images: Tensor) -> Tensor:
        """Returns images uint8 (B, H, W, 3) as float32 (B, 3, S, S), channels_last, as the network wants them."""
        return (self.resize(images) - self.mean) * self.scale

    def resize(self, images: Tensor) -> Tensor:
        """Returns images uint8 (B, H, W, 3) as float32 (B, 3, S, S), channels_last, in [0, 255].

        They are resized to the network's own S if they were made for another network, or if `training_size` asks for
        it.
        """
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)  # NHWC in memory is channels_last after the permute
        size = self.spec.size if self.spec.resized else images.shape[1]
        size = (self.training and self.training_size) or size
        if images.shape[1] != size:
            pixels = F.interpolate(pixels, (size, size), mode=self.spec.interpolation, antialias=True).clamp(0, 255)
        return pixels

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of its network, so that it can be used without its run."""
        return {"classes": list(self.classes), "input": self.spec.to_dict()}


def count_parameters(network: nn.Module) -> int:
    """Learnable parameters of `network`."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
