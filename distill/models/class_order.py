"""Which class an output of a network stands for: names decide, whatever the order of either side."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from distill.errors import UserError
from distill.models.classifier import Classifier


class OtherClasses(UserError):
    """A file that names other classes than the data has."""


@dataclass(frozen=True)
class ClassNames:
    """The classes of the data, in its order, and how names of a file of weights are compared with them.

    mode: of --class-order, `names` or `ignore`. aliases: name -> the usual name of the same class. usual: orders that a
    file without names is taken to have where the data has these very classes, by what they are called.
    """

    names: tuple[str, ...]
    mode: str = "names"
    aliases: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def order_of(self, theirs: Sequence[str], source: str) -> list[int] | None:
        """Returns for each class of the data the number that it has in the file `source`, None where all are the same.

        theirs: the names in the file, () where it has none. What is assumed or done is printed. Raises OtherClasses
        where the file names others.
        """
        if self.mode == "ignore" or tuple(theirs) == self.names:
            return None
        ours: Sequence[str] = self.names
        if not theirs:
            for title, names in self.usual.items():
                if _match(names, ours, self.aliases) is not None:
                    print(f"classes: {source} does not name its classes: taken to be in {title}")
                    return self._order(names, ours, source)
            print(f"classes: {source} does not name its classes: taken to be in the data's order, {shortened(ours)}")
            return None
        count = [str(number) for number in range(len(ours))]  # names of classes that have none, on one side
        if _match(count, theirs, {}) and not all(map(str.isdecimal, ours)):
            print(f"classes: {source} has numbers for its classes, taken to be those of the names in the data")
            ours = count
        elif _match(count, ours, {}) and not all(map(str.isdecimal, theirs)):
            print(f"classes: the data has numbers for its classes, taken to be those of the names in {source}")
            theirs = count
        return self._order(theirs, ours, source)

    def _order(self, theirs: Sequence[str], ours: Sequence[str], source: str) -> list[int] | None:
        order = _match(theirs, ours, self.aliases)
        if order is None:
            hint = f"trainCE.sh, or train.sh, with --init {source} trains it for these"
            if len(theirs) == len(ours):
                hint += "; --class-order ignore takes them to be the same, number by number"
            raise OtherClasses(
                f"{source} knows the classes {shortened(theirs)}, the data has {shortened(ours)}: {hint}"
            )
        if order == list(range(len(order))):
            return None
        print(
            f"classes: {source} has the order {shortened(theirs)}: its outputs are put in that of the data, "
            f"{shortened(ours)} (--class-order ignore leaves them)"
        )
        return order


def _match(theirs: Sequence[str], ours: Sequence[str], aliases: Mapping[str, str]) -> list[int] | None:
    """Returns where each of `ours` stands in `theirs`, None if they are other classes.

    They are compared by exact names, else by plain forms, else without capitals and aliases. (ImageNet has a cardigan
    and a Cardigan.)
    """
    for form in (str, _plain, lambda name: aliases.get(_plain(name.casefold()), _plain(name.casefold()))):
        places = {form(name): number for number, name in enumerate(theirs)}
        wanted = [form(name) for name in ours]
        if len(theirs) == len(ours) == len(set(wanted)) and places.keys() == set(wanted):
            return [places[name] for name in wanted]
    return None


def _plain(name: str) -> str:
    """One blank for blanks and lines, numbers without leading zeros."""
    form = " ".join(re.split(r"[\s_-]+", name.strip()))
    return str(int(form)) if re.fullmatch("[0-9]{1,9}", form) else form


def shortened(names: Sequence[str]) -> str:
    """`a, b, c, d, ..., z (26)`."""
    if len(names) <= 6:
        return ", ".join(names)
    return f"{', '.join(names[:5])}, ..., {names[-1]} ({len(names)})"


def last_layer(network: nn.Module, build: Callable[[int], nn.Module], classes: int) -> list[str]:
    """Returns the keys of a network of `classes` that have another shape where `build` makes it for one class more."""
    with torch.random.fork_rng(devices=[]):
        wider = build(classes + 1).state_dict()
    return [key for key, value in network.state_dict().items() if value.shape != wider[key].shape]


@torch.no_grad()
def put_in_order(classifier: Classifier, order: Sequence[int], build: Callable[[int], nn.Module], source: str) -> None:
    """Makes output k of the network what its output order[k] was, by the order of the rows in its last layer.

    Raises UserError where that does not move the outputs.
    """
    network, count = classifier.network, len(order)
    last = [network.state_dict()[key] for key in last_layer(network, build, count)]
    size, device = classifier.spec.size, classifier.mean.device
    noise = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, was_training = classifier.normalise(noise.to(device)), network.training
    before = network.eval()(images)[:, order]
    for value in last:
        if len(value) != count:
            raise UserError(f"{source}: the last layer of this network cannot be put in the data's order of classes")
        value.copy_(value[list(order)])
    moved = network(images)
    network.train(was_training)
    if not last or (moved - before).abs().max() > 1e-3 * before.abs().max():
        raise UserError(f"{source}: the last layer of this network cannot be put in the data's order of classes")
