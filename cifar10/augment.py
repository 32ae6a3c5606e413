"""View policies for small images: whole batches at once, on the images' device, row by row independent.

All of them are integer gathers and float32 arithmetic element by element, whose result depends neither on the batch nor
on the number of threads; so a view is the same in any batch, order and process.
"""

import math

import numpy as np
import torch
from torch import Tensor

from distill.config.recipe import Recipe
from distill.data.draws import ViewDraws
from distill.data.views import ViewPolicy
from distill.errors import UserError

PADDING = 4  # pixels on each side before the crop
OFFSETS = 2 * PADDING + 1


class NoChange:
    """The image as it is: one view."""

    name = "none"
    view_count: int | None = 1
    alternating = False

    def render(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Returns the views, as ViewPolicy says."""
        return images


class CropFlip:
    """Padded by `padding` pixels, cropped back to its size, flipped or not: with 4 exactly 2 * 9 * 9 = 162 views.

    View v: flipped left to right if v >= 81, from row (v % 81) // 9 and column v % 9 of the padded image. The padding
    is black, or with `reflect` the image mirrored at its edge. `alternating`: one of two epochs shows an image flipped.
    """

    def __init__(self, padding: int = PADDING, *, reflect: bool = False, alternating: bool = False) -> None:
        self.padding, self.reflect, self.alternating = padding, reflect, alternating
        self.offsets = 2 * padding + 1
        self.view_count: int | None = 2 * self.offsets**2
        words = [f"pad{padding}"] * (padding != PADDING) + ["reflect"] * reflect + ["alternating"] * alternating
        self.name = "+".join(["crop_flip", *words])

    def render(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Returns the views, as ViewPolicy says."""
        batch, height, width, channels = images.shape
        offsets, padding = self.offsets, self.padding
        views = views.to(images.device, non_blocking=True)
        flipped, crop = views >= offsets * offsets, views % (offsets * offsets)
        rows, columns = crop // offsets, crop % offsets
        padded = self._padded(images)
        line = (width + 2 * padding) * channels
        # windows[b, y, x] is the crop of image b from (y, x), as rows of bytes: a view of memory, not a copy
        windows = padded.as_strided(
            (batch, offsets, offsets, height, width * channels),
            ((height + 2 * padding) * line, line, channels, line, 1),
        )
        cropped = windows[torch.arange(batch, device=images.device), rows, columns]
        cropped = cropped.view(batch, height, width, channels)
        return torch.where(flipped.view(-1, 1, 1, 1), cropped.flip(2), cropped)

    def _padded(self, images: Tensor) -> Tensor:
        batch, height, width, channels = images.shape
        if self.reflect:
            y, x = (self._mirrored(side, images.device) for side in (height, width))
            return images[:, y][:, :, x].contiguous()
        p = self.padding
        padded = images.new_zeros(batch, height + 2 * p, width + 2 * p, channels)
        padded[:, p : p + height, p : p + width] = images
        return padded

    def _mirrored(self, side: int, device: torch.device) -> Tensor:
        """-p .. side + p - 1 folded back into 0 .. side - 1, the edge itself once."""
        places = torch.arange(-self.padding, side + self.padding, device=device).abs()
        return side - 1 - (side - 1 - places).abs()


class Original:
    """The original repository's transforms: crop and flip as above, rotation, colour jitter.

    Rotation by up to 15 degrees either way about the centre, nearest pixel, black outside; then brightness, contrast
    and saturation by factors in [0.8, 1.2], in random order, each rounded down to uint8 as PIL does. The geometry is
    one gather.
    """

    name = "original"
    view_count: int | None = None
    alternating = False
    degrees, jitter = 15.0, 0.2
    draws = 10  # row, column, flip, angle, three factors, three keys whose order is the order of the jitters

    def __init__(self, view_seed: int) -> None:
        self._drawn = ViewDraws(view_seed, "original", self.draws)

    def render(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Returns the views, as ViewPolicy says."""
        drawn = self._drawn.rows(indices, views)
        angle = (2 * drawn[:, 3] - 1) * math.radians(self.degrees)
        offsets = np.floor(drawn[:, :2] * OFFSETS) - PADDING
        # In float64 on the CPU, where cosines do not depend on the device.
        geometry = np.column_stack([offsets, drawn[:, 2] >= 0.5, np.cos(angle), np.sin(angle)])
        factors = 1 + self.jitter * (2 * drawn[:, 4:7] - 1)
        order = np.argsort(drawn[:, 7:], axis=1)
        moved = self._move(images, torch.from_numpy(geometry.astype(np.float32)).to(images.device, non_blocking=True))
        factor_tensor = torch.from_numpy(factors.astype(np.float32)).to(images.device, non_blocking=True)
        return self._jitter(moved, factor_tensor, torch.from_numpy(order).to(images.device, non_blocking=True))

    @staticmethod
    def _move(images: Tensor, geometry: Tensor) -> Tensor:
        """Crop, flip and rotate. For each pixel of the result: the source pixel, or none (black)."""
        batch, height, width, _ = images.shape
        row_offset, column_offset, flipped, cosine, sine = geometry.view(batch, -1, 1, 1).unbind(1)
        y = (torch.arange(height, device=images.device) - (height - 1) / 2).view(1, -1, 1)
        x = (torch.arange(width, device=images.device) - (width - 1) / 2).view(1, 1, -1)
        rows = (x * sine + y * cosine + (height - 1) / 2).round()
        columns = (x * cosine - y * sine + (width - 1) / 2).round()
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        columns = torch.where(flipped > 0, width - 1 - columns, columns)
        rows, columns = rows + row_offset, columns + column_offset
        inside &= (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        source = torch.where(inside, rows * width + columns, 0).long().view(batch, -1, 1)
        pixels = images.reshape(batch, height * width, -1)
        moved = pixels.gather(1, source.expand(-1, -1, pixels.shape[2])).view_as(images)
        return moved * inside.unsqueeze(-1)

    @staticmethod
    def _jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """Returns factor * image + (1 - factor) * other, where other is black, the mean grey, or the grey image.

        Grey and its mean are integer arithmetic, so that no order of summation can matter.
        """
        batch = len(images)
        for slot in range(3):
            kind = order[:, slot].view(-1, 1, 1)
            red, green, blue = images.int().unbind(-1)
            grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16  # ITU-R 601-2, as PIL computes it
            count = grey[0].numel()
            mean = (2 * grey.view(batch, -1).sum(1) + count) // (2 * count)
            other = torch.where(kind == 1, mean.view(-1, 1, 1), torch.where(kind == 2, grey, 0)).float().unsqueeze(-1)
            factor = factors.gather(1, order[:, slot : slot + 1]).view(-1, 1, 1, 1)
            images = (factor * images.float() + (1 - factor) * other).clamp(0, 255).to(torch.uint8)
        return images


class Cutout:
    """A policy's views with a square of `size` pixels blotted out, centred on any pixel, so that the edge may cut it.

    The square is part of the view: it is drawn for (view seed, i, v). It has the mean colour of CIFAR-10, which is 0
    for a network that normalises by it. DeVries and Taylor 2017, arXiv:1708.04552 (16 pixels for CIFAR-10).
    """

    colour = (125, 123, 114)

    def __init__(self, policy: ViewPolicy, size: int, view_seed: int) -> None:
        self.name, self.view_count = f"{policy.name}+cutout{size}", policy.view_count
        self.alternating = policy.alternating
        self._policy, self._size = policy, size
        self._drawn = ViewDraws(view_seed, "cutout", 2)

    def render(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Returns the views, as ViewPolicy says."""
        height, width = images.shape[1:3]
        start = np.floor(self._drawn.rows(indices, views) * (height, width)) - self._size // 2
        top, left = torch.from_numpy(start.astype(np.int64)).to(images.device, non_blocking=True).unbind(1)
        y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        rows = (y >= top.view(-1, 1)) & (y < top.view(-1, 1) + self._size)
        columns = (x >= left.view(-1, 1)) & (x < left.view(-1, 1) + self._size)
        square = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(3)
        return torch.where(
            square,
            torch.tensor(self.colour, dtype=torch.uint8).to(images.device, non_blocking=True),
            self._policy.render(images, indices, views),
        )


def build_policy(recipe: Recipe) -> ViewPolicy:
    """The policy that `recipe` names. Raises UserError if it has fewer views than are asked for."""
    cropped = CropFlip(recipe.padding, reflect=recipe.reflect, alternating=recipe.alternate_flip)
    policies: dict[str, ViewPolicy] = {"crop_flip": cropped, "original": Original(recipe.view_seed), "none": NoChange()}
    policy = policies[recipe.augment]
    if recipe.views and policy.view_count and recipe.views > policy.view_count:
        raise UserError(
            f"--views must be at most {policy.view_count} with --augment {recipe.augment}, got {recipe.views}"
        )
    return Cutout(policy, recipe.cutout, recipe.view_seed) if recipe.cutout else policy
