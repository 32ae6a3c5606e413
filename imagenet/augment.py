"""View policies for photos: one image at a time, in the workers that decode it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from distill.data.draws import uniforms_of
from imagenet.decoding import Box, read_box, read_centre, simplejpeg

TRIES = 10
DRAWS = 2 * TRIES + 8  # area and ratio of each try, then row, column, flip, the seed of the colours, cutout's centre
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN = (124, 116, 104)  # of ImageNet's pixels


@dataclass(frozen=True)
class PhotoViews:
    """View v of photo i, from its file and (policy, view seed, i, v) alone.

    crop: a random-resized crop (8 to 100 % of the area, sides in the ratio 3/4 to 4/3; Szegedy et al. 2014,
    arXiv:1409.4842), flipped or not. crop_jitter: then brightness, contrast and saturation by factors in [0.6, 1.4].
    autoaugment: then ImageNet's policy (Cubuk et al. 2018, arXiv:1805.09501). randaugment: then 2 operations of
    magnitude 9 of 30 (Cubuk et al. 2019, arXiv:1909.13719). The three are torchvision's, with its generator set from
    (view seed, i, v). none: as a network is evaluated, the short side at `resized`, then the centre.
    cutout: pixels of a square with the mean colour (DeVries and Taylor 2017, arXiv:1708.04552).
    """

    policy: str
    size: int
    view_seed: int = 0
    decoder: str = "torchvision"
    cutout: int = 0
    resized: int = 0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.decoder == "simplejpeg":
            simplejpeg()  # an absent package is told before the first photo

    @property
    def name(self) -> str:
        """Returns the policy and all its parameters: policies of one name show the same."""
        cutout = f"+cutout{self.cutout}" if self.cutout else ""
        how = f"-{self.resized}-{self.interpolation}" if self.policy == "none" else ""
        return f"{self.policy}{self.size}{how}{cutout}-{self.decoder}"

    @property
    def seeds_torch(self) -> bool:
        """Returns whether views are drawn by torch's own generator, which the threads of a process share."""
        return self.policy not in ("none", "crop")

    alternating = False

    @property
    def view_count(self) -> int | None:
        """Returns the number of distinct views, None where parameters are continuous."""
        return 1 if self.policy == "none" else None

    def render(self, file: str, index: int, view: int) -> Tensor:
        """uint8 (size, size, 3). Raises BrokenImage."""
        if self.policy == "none":
            return read_centre(file, self.resized, self.size, self.interpolation, self.decoder).permute(1, 2, 0)
        drawn = uniforms_of(self.view_seed, "photo", view, index, DRAWS)
        after = drawn[2 * TRIES :]
        pixels = read_box(file, lambda height, width: random_box(height, width, drawn), self.size, self.decoder)
        pixels = (pixels.flip(2) if after[2] >= 0.5 else pixels).permute(1, 2, 0)
        if self.seeds_torch:
            pixels = _recolour(pixels, self.policy, int(after[3] * 2**53))
        if self.cutout:
            pixels = pixels.contiguous()
            top, left = (math.floor(place * self.size) - self.cutout // 2 for place in after[4:6])
            rows, columns = (slice(max(start, 0), max(start + self.cutout, 0)) for start in (top, left))
            pixels[rows, columns] = torch.tensor(MEAN, dtype=torch.uint8)
        return pixels


def random_box(height: int, width: int, drawn: NDArray[np.float64]) -> Box:
    """Returns the first of ten draws of area and ratio that fits, at a random place.

    Without one it is the largest centre of a ratio that is allowed.
    """
    for area, ratio in drawn[: 2 * TRIES].reshape(TRIES, 2):
        target = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        aspect = math.exp(math.log(RATIO[0]) + ratio * (math.log(RATIO[1]) - math.log(RATIO[0])))
        wide, tall = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            row, column = drawn[2 * TRIES : 2 * TRIES + 2]
            return Box(int(row * (height - tall + 1)), int(column * (width - wide + 1)), tall, wide)
    tall = min(height, round(width / RATIO[0]))
    wide = min(width, round(height * RATIO[1]))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)


@lru_cache
def _transform(policy: str) -> Callable[[Any], Any]:
    how: dict[str, Any] = {"interpolation": InterpolationMode.BILINEAR, "fill": list(MEAN)}
    if policy == "autoaugment":
        return transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET, **how)
    if policy == "randaugment":
        return transforms.RandAugment(2, 9, **how)
    return transforms.ColorJitter(0.4, 0.4, 0.4)


def _recolour(pixels: Tensor, policy: str, seed: int) -> Tensor:
    """uint8 (H, W, 3), the same; torchvision draws from torch's own generator, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.from_numpy(np.array(_transform(policy)(Image.fromarray(pixels.numpy()))))
