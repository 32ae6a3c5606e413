"""torch by names that load it on their first use.

Losses and recipes are imported before the flags are checked, and torch takes seconds to load: a wrong flag must not
wait for it. A file that imports its names from here needs `from __future__ import annotations`, and may use them inside
functions and annotations alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)  # from now on an attribute like any other
            return value

    torch, F, Tensor = _LazyModule("torch"), _LazyModule("torch.nn.functional"), Any

__all__ = ["F", "Tensor", "torch"]
