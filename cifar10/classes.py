"""The names of CIFAR-10's classes, and what else people call them."""

from collections.abc import Sequence

from distill.models.class_order import ClassNames

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # in their order
ALIASES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile"}


def class_names(names: Sequence[str], mode: str) -> ClassNames:
    """The classes of the data as files of weights are compared with them; `mode`: of --class-order."""
    return ClassNames(tuple(names), mode, ALIASES, {"CIFAR-10's order": CLASSES})
