"""Weights from a file of ours or of others: what it holds, what it says of itself, and into a network with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.errors import CheckpointError
from distill.files import checkpoint
from distill.files.reading import read
from distill.files.stand_ins import Array
from distill.models.class_order import ClassNames, OtherClasses, last_layer, put_in_order, shortened
from distill.models.classifier import Classifier, InputSpec

RAW = ("student", "net", "state_dict", "model_state_dict", "model", "module", "network", "weights", "params")
AVERAGES = ("average", "model_ema", "state_dict_ema", "ema_state_dict", "ema")  # ours first
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile
COUNTERS = ("total_ops", "total_params", "n_averaged")  # of thop, and of torch's averages
WHICH = ("raw", "ema")


@dataclass(frozen=True)
class Weights:
    """A state_dict, and what its file says of it: () and None where it does not."""

    source: str
    state: Mapping[str, Tensor]
    classes: tuple[str, ...] = ()  # names, in the order of the outputs
    spec: InputSpec | None = None  # what the network was trained to see
    arch: str | None = None
    recipe: Mapping[str, Any] | None = None
    note: str = ""
    published: bool = False  # by the network's authors
    commit: str | None = None  # of this repository, that trained them
    epochs_left: int = 0  # of the run whose last checkpoint they are

    @property
    def title(self) -> str:
        """What they are called beside the name of their network."""
        return "its published weights" if self.published else self.source


def warn_of_origin(weights: Weights | None, val_split: int, who: str) -> None:
    """Prints a warning if the run that the weights of `who` are from is unfinished, or held out too few images.

    These are fewer than `val_split`. A file of others does not tell.
    """
    if weights and weights.epochs_left:
        left = f"of which {weights.epochs_left} epochs are left"
        print(f"warning: the {who} is of the run {weights.source}, {left}: its weights will be others")
    if weights and weights.recipe is not None and weights.recipe.get("val_split", 0) < val_split:
        print(f"warning: the {who} may have seen images of the validation part: what is chosen on it is too optimistic")


def load(path: Path, which: str | None = None, flag: str = "--weights") -> Weights:
    """The weights in a checkpoint of ours or of others, bare, wrapped or prefixed. Raises CheckpointError.

    path: a file, or a run's directory, whose last checkpoint is taken. which: `raw` or `ema`, where a file may hold
    both; None is what counts, of ours the average. `flag`: that says so.
    """
    if (path / checkpoint.LAST).is_file():
        path = path / checkpoint.LAST
    elif path.is_dir():
        raise CheckpointError(f"{path} is a directory without {checkpoint.LAST}: name a run's directory, or a file")
    content = read(path)
    if isinstance(content, dict) and "digest" in content:
        content = checkpoint.load(path)
    key, note = _choose(content, path, which, flag)
    state = {}
    for name, value in (content[key] if key else content).items():
        name = str(name)
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        numbers = value.tensor() if isinstance(value, Array) else value
        if numbers is None:
            raise CheckpointError(f"{path} holds an array that is not of numbers, {name}")
        state[name] = numbers
    fields = content if isinstance(content, dict) and key else {}
    recipe = fields.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else None
    arch = (recipe or fields).get("arch")
    left = max(recipe.get("epochs", 0) - fields.get("epoch", 0), 0) if recipe and "ranks" in fields else 0
    spec, classes, commit = _spec(fields.get("input")), _classes(fields), fields.get("commit")
    return Weights(
        str(path),
        state,
        classes,
        spec,
        arch if isinstance(arch, str) else None,
        recipe,
        note,
        commit=commit if isinstance(commit, str) else None,
        epochs_left=left,
    )


def _choose(content: Any, path: Path, which: str | None, flag: str) -> tuple[str | None, str]:
    """The key of the state_dict in a file, None where the file is one, and a line where there was a choice."""
    if _is_state(content):
        if which == "ema":
            raise CheckpointError(f"{flag} ema: {path} holds one set of weights only, and does not say of an average")
        return None, ""
    inside = [key for key, value in content.items() if _is_state(value)] if isinstance(content, Mapping) else []
    raw = next((key for key in RAW if key in inside), None)
    average = next((key for key in AVERAGES if key in inside), None)
    if not raw and not average and len(inside) == 1:
        return inside[0], f"note: {path}: its weights are taken from {inside[0]!r}"
    wanted = {"raw": raw, "ema": average, None: average if average == AVERAGES[0] else raw or average}[which]
    if not (raw or average):
        raise CheckpointError(f"{path} holds no weights (neither a state_dict nor one under {', '.join(RAW)})")
    if not wanted:
        raise CheckpointError(f"{flag} {which}: {path} holds {raw or average} only")
    other = raw if wanted == average else average
    if which or not other or wanted == AVERAGES[0]:
        return wanted, ""
    return wanted, f"note: {path} holds {raw} and {average}: {wanted} is taken, {flag} ema takes the other"


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, (Tensor, Array)) for v in value.values())


def _spec(fields: Any) -> InputSpec | None:
    """What a checkpoint of ours says of its network's input; None for anything else."""
    try:
        spec = InputSpec(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
        numbers = [*spec.mean, *spec.std, spec.size, spec.resized]
        fits = len(numbers) == 8 and all(type(number) in (int, float) for number in numbers)
        return spec if fits and min(spec.std) > 0 and spec.interpolation in ("bilinear", "bicubic") else None
    except (TypeError, ValueError, KeyError):
        return None


def _classes(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `classes`, or those of torchvision's `class_to_idx`, in their order."""
    names, numbers = fields.get("classes"), fields.get("class_to_idx")
    if isinstance(numbers, dict) and sorted(map(repr, numbers.values())) == sorted(map(repr, range(len(numbers)))):
        names = sorted(numbers, key=numbers.__getitem__)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names) if len(set(names)) == len(names) else ()


# ---------------------------------------------------------------------------------------------------- into the network
def give(
    classifier: Classifier,
    weights: Weights,
    classes: ClassNames,
    build: Callable[[int], nn.Module],
    *,
    new_head: bool = False,
) -> None:
    """Loads `weights` into a network, its outputs in the data's order of classes; what is assumed is printed.

    build: makes the same network for any number of classes. new_head: where the weights are of other classes the
    last layer stays as it is. Raises UserError where they do not fit.
    """
    if weights.note:
        print(weights.note)
    network = classifier.network
    state = fitted(weights.state, network, weights.source)
    whole, new = state, False
    if new_head:
        last = partial(last_layer, network, build, len(classes.names))
        whole, new = with_own_head(network, state, last, weights.source)
    try:
        order = None if new else classes.order_of(weights.classes, weights.source)
    except OtherClasses:
        if not new_head:
            raise
        own = {key: network.state_dict()[key] for key in last_layer(network, build, len(classes.names))}
        whole, order = {**whole, **own}, None
        known, new_keys = f"{weights.source} knows the classes {shortened(weights.classes)}", ", ".join(own)
        kept = "--class-order ignore keeps them"
        print(f"note: {known}, the data has {shortened(classes.names)}: {new_keys} are new; {kept}")
    checkpoint.apply_weights(network, whole, weights.source)
    if order:
        put_in_order(classifier, order, build, weights.source)


def fitted(state: Mapping[str, Tensor], network: nn.Module, source: str) -> dict[str, Tensor]:
    """Returns `state` with the names that `network` has; what is changed is printed.

    Counters of other tools are left out, and a prefix of all keys if the rest is what `network` has.
    """
    own = network.state_dict().keys()
    dropped = [key for key in state if key not in own and key.rpartition(".")[2] in COUNTERS]
    kept = {key: value for key, value in state.items() if key not in dropped}
    if dropped:
        kinds = ", ".join(sorted({key.rpartition(".")[2] for key in dropped}))
        print(f"note: {source}: {len(dropped)} counters are left out ({kinds})")
    needed = {key for key in own if not key.endswith("num_batches_tracked")}
    prefix, first = "", next(iter(kept), "")
    while "." in first[len(prefix) :] and not needed <= kept.keys():
        prefix = first[: first.index(".", len(prefix)) + 1]
        if not all(key.startswith(prefix) for key in kept):
            break
        stripped = {key[len(prefix) :]: value for key, value in kept.items()}
        if needed <= stripped.keys() <= own | {key for key in stripped if key.endswith("select.indexes")}:
            print(f"note: {source}: the prefix {prefix!r} of all names is taken off")
            return stripped
    return kept


def with_own_head(
    network: nn.Module, state: Mapping[str, Tensor], last: Callable[[], list[str]], source: str
) -> tuple[dict[str, Tensor], bool]:
    """`state` with the network's own last layer where that has another number of classes, and whether it has.

    last: the keys of that layer.
    """
    own = network.state_dict()
    shared = [key for key in state if key in own and state[key].shape != own[key].shape]
    heads = [key for key in shared if state[key].dim() and state[key].shape[1:] == own[key].shape[1:]]
    heads = [key for key in last() if key in heads] if heads else []
    if heads:
        classes = sorted({len(state[key]) for key in heads})
        new = f"{', '.join(heads)} are new"
        print(f"note: {source} knows {classes[0]} classes, the data has {len(own[heads[0]])}: {new}")
    return {**state, **{key: own[key] for key in heads}}, bool(heads)
