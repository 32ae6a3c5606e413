"""What --dataset of the scripts stands for: the recipes, flags, networks and images of one kind. Loads no torch."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from typing import Any

from cifar10 import recipes as small
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from imagenet import recipes as photos


@dataclass(frozen=True)
class Dataset:
    """One kind of images: `cifar10`, small ones, or `imagenet`, photos."""

    name: str
    recipes: Mapping[str, Recipe]
    default_ce: str  # the recipe of trainCE.sh, or train.sh
    default_kd: str  # the recipe of trainKD.sh, or train.sh --kd
    recipe_type: type[Recipe]
    options_type: type[Options]
    task: str  # the class in NAME/task.py
    test_split: str  # what its folder is called
    num_classes: int  # of the data set that it is named after
    published: bool  # whether there are weights of its networks by their authors

    def open(self, recipe: Recipe, options: Options, images: Any = None) -> Any:
        """Returns the distill.training.task.Task of `recipe`; its images are loaded, unless `images` are given."""
        more = {} if self.published else {"train": self.module("train_ce").train}  # a teacher that there is not yet
        return getattr(self.module("task"), self.task)(recipe, options, images, **more)

    def module(self, name: str) -> Any:
        """Returns a module of the package, such as `models` or `train_kd`."""
        return import_module(f"{self.name}.{name}")

    def with_flags(self, flags: type) -> type[Options]:
        """Returns the options of this kind with the fields of the dataclass `flags` before them."""
        return make_dataclass(flags.__name__, [], bases=(flags, self.options_type), frozen=True)


DATASETS = {
    "cifar10": Dataset("cifar10", small.RECIPES, "student", "kd", Recipe, Options, "SmallImages", "test", 10, False),
    "imagenet": Dataset(
        "imagenet",
        photos.RECIPES,
        "standard",
        "standard_kd",
        photos.ImageNetRecipe,
        photos.ImageNetOptions,
        "PhotoTask",
        "val",
        1000,
        True,
    ),
}


def take_dataset(argv: Sequence[str]) -> tuple[Dataset, list[str]]:
    """Returns what --dataset in `argv` names, cifar10 without it, and the other words. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", default="cifar10")
    given, rest = parser.parse_known_args(argv)
    if given.dataset not in DATASETS:
        raise UserError(f"--dataset must be one of {', '.join(DATASETS)}, got {given.dataset!r}")
    return DATASETS[given.dataset], rest
