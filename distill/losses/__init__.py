"""The losses of distillation: one file a method, found here by itself. Loads no torch.

To add a method on logits, write a file here with a function of tensors and a dataclass made from Method (method.py), as
dkd.py does; on features, one made from FeatureMethod (feature_method.py), as at.py does. Its fields become flags;
--help, records, tests and the table of distill/README.md find it.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from distill.losses.feature_method import FeatureMethod
from distill.losses.method import Method, Settings

Kind = TypeVar("Kind", bound=Settings)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def find_methods(base: type[Kind]) -> dict[str, type[Kind]]:
    """Returns all subclasses of `base` by their names. Raises ValueError if two have the same."""
    methods: dict[str, type[Kind]] = {}
    for method in base.__subclasses__():
        for name, other in [(method.name, method), *find_methods(method).items()]:
            if methods.setdefault(name, other) is not other:
                raise ValueError(f"{name} is the name of two methods, {methods[name]} and {other}")
    return methods


METHODS = find_methods(Method)
"""The methods on logits, by the name that --method takes."""

FEATURES = find_methods(FeatureMethod)
"""The methods on features, by the name that --features takes."""
