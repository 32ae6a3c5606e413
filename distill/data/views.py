"""What a view policy is, and what all policies share."""

from typing import Protocol

import torch
from torch import Tensor

from distill.errors import UserError


class Views(Protocol):
    """How view v of image i looks, as far as the order of the views and the key of a store have to know."""

    @property
    def name(self) -> str:
        """The policy and all its parameters: policies of one name show the same."""
        ...

    @property
    def view_count(self) -> int | None:
        """Distinct views of an image; None where parameters are continuous."""
        ...

    @property
    def alternating(self) -> bool:
        """Whether the first half of the views and the second take turns from epoch to epoch."""
        ...


class ViewPolicy(Views, Protocol):
    """A policy for small images, that works on whole batches. Implementations: cifar10/augment.py."""

    def render(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Returns the views, uint8 (B, H, W, 3) on the images' device, row by row independent.

        images: uint8 (B, H, W, 3) on any device; indices, views: int64 (B,) on the CPU, where parameters are drawn
        without waiting for a device.
        """
        ...


def check_cutout(cutout: int, side: int) -> None:
    """Raises UserError where a square of `cutout` pixels, wherever its centre lies, covers an image of `side` pixels.

    Its first row is at most side - 1 - cutout // 2, and its last one at least cutout - 1 - cutout // 2.
    """
    if cutout >= 2 * side - 1:
        raise UserError(f"--cutout {cutout} blots out every image of {side} pixels: it takes {2 * side - 2} at most")


def mix(images: Tensor, others: Tensor, coefficient: Tensor) -> Tensor:
    """Returns c * images + (1 - c) * others, rounded to uint8; both uint8 (B, H, W, 3), coefficient c: (B,)."""
    weight = coefficient.view(-1, 1, 1, 1)
    return (weight * images + (1 - weight) * others).round().to(torch.uint8)
