"""The losses of distillation: one file a method, found here by itself. Loads no torch.

To add a method, write a file here with a function of tensors and a dataclass made from Method (method.py), as dkd.py
does. Its fields become flags; --help, records, tests and README's table find it.
"""

from importlib import import_module
from pkgutil import iter_modules

from distill.losses.method import Method

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

METHODS: dict[str, type[Method]] = {method.name: method for method in Method.__subclasses__()}
"""The methods on logits, by the name that --method takes."""
