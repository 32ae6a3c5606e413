"""Networks by name."""

import difflib
from collections.abc import Callable

from torch import nn

from distill.errors import UserError

Builder = Callable[[int], nn.Module]


class Registry:
    """Names -> functions `num_classes -> nn.Module`. The function's name is the architecture's name."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._builders: dict[str, Builder] = {}

    def register(self, builder: Builder) -> Builder:
        """Decorator. Raises ValueError if the name is taken: two networks of one name would mix up records."""
        name = builder.__name__
        if name in self._builders:
            raise ValueError(f"{name} is registered twice in {self.title}")
        self._builders[name] = builder
        return builder

    def __contains__(self, name: str) -> bool:
        """Whether a network is registered as `name`, in any spelling."""
        return _flatten(name) in map(_flatten, self._builders)

    def names(self) -> list[str]:
        """Returns the names of all networks, in order."""
        return sorted(self._builders)

    def resolve(self, name: str) -> str:
        """The registered spelling of `name`: case, `-` and `_` do not matter. Raises UserError with near names."""
        flat = {_flatten(listed): listed for listed in self._builders}
        if _flatten(name) in flat:
            return flat[_flatten(name)]
        near = difflib.get_close_matches(_flatten(name), flat, n=4, cutoff=0.5)
        listed = ", ".join(flat[n] for n in near) if near else ", ".join(self.names())
        raise UserError(f"unknown architecture {name!r} for {self.title}; {'near it' if near else 'known'}: {listed}")

    def build(self, name: str, num_classes: int) -> nn.Module:
        """A freshly initialised network with `num_classes` outputs."""
        return self._builders[self.resolve(name)](num_classes)


def _flatten(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
