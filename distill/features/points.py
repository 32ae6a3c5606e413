"""Where a network's stages end, found by watching it at work, and the features there.

A forward pass is watched on the level of torch's functions, whatever the modules around them are and whether torch.fx
can follow them; which tensors everything passes through is read from the autograd graph of that pass.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.errors import UserError
from distill.models.classifier import Classifier

ACTIVATIONS: set[Any] = {
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.celu),
    *(F.silu, F.gelu, F.hardswish, F.mish, F.selu, F.prelu),
}
LINEAR = ("Convolution", "ConstantPad", "Add", "AvgPool", "MaxPool", "AdaptiveAvgPool", "Mean", "Permute", "View")
"""Autograd nodes that may follow on a block which ends without an activation."""
POOLED = ("MeanBackward", "AdaptiveAvgPool")  # over the whole image: no stage after it
LAYERS = ("Convolution", "Addmm", "Mm")  # the last of them, the classifier, is no stage
STAGES = 2  # at least


@dataclass(frozen=True, eq=False)
class FeaturePoint:
    """The end of a stage: the first argument of the `call`-th call (from 0) of `function` in a forward pass.

    where: for people. shape: (C, H, W) as it was seen, (D,) of what the last layer gets. scale, shift: weight and bias
    (C,) of the BatchNorm there, if there is one. overwritten: that call works in place.
    """

    function: Any
    call: int
    where: str
    shape: tuple[int, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    overwritten: bool = False


class FeatureExtractor(nn.Module):
    """A classifier that returns its features at `points` beside its logits.

    images -> (logits (B, C), [(B, C_i, H_i, W_i)]). after: of a point before an activation, what that returns.
    """

    def __init__(self, classifier: Classifier, points: Iterable[FeaturePoint], *, after: bool = False) -> None:
        super().__init__()
        self.classifier, self.points, self.after = classifier, tuple(points), after

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns (logits, features). Raises UserError if the network does not reach a point."""
        with _Capture(self.points, self.after) as tap:
            logits = self.classifier(images)
        tensors = [(tap.found.get(point), point.shape) for point in self.points]
        features = [f.flatten(1) if len(shape) == 1 else f for f, shape in tensors if f is not None]
        if [f.shape[1:] for f in features] != [point.shape for point in self.points]:
            raise UserError("--features: a network computes other things while it trains than when it was watched")
        return logits, features


class _Capture(TorchFunctionMode):
    """Keeps the tensors at `points` of the calls made within it. Of one thread, as DataParallel wants it."""

    def __init__(self, points: Iterable[FeaturePoint], after: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.after = after
        self.points = {(point.function, point.call): point for point in points}
        self.functions = {point.function for point in points}
        self.calls: Counter[Any] = Counter()
        self.found: dict[FeaturePoint, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in self.functions:
            return function(*args, **(kwargs or {}))
        point = self.points.get((function, self.calls[function]))
        self.calls[function] += 1
        if point is None:
            return function(*args, **(kwargs or {}))
        self.found[point] = args[0]
        if self.after and function in ACTIVATIONS:
            self.found[point] = function(*args, **(kwargs or {}))
            return self.found[point]
        if point.overwritten:
            args = (args[0].clone(), *args[1:])
        return function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------ finding points
@dataclass
class _Seen:
    """A tensor that a function has returned. `used_by`: (function, call, autograd node after it, in place)."""

    shape: tuple[int, ...]
    where: str
    batch_norm: tuple[Tensor | None, Tensor | None] | None = None
    used_by: list[tuple[Any, int, Any, bool]] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Notes each tensor (B, C, H, W) that a function returns, by its autograd node, and each call that takes it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Any] = Counter()
        self.seen: dict[Any, _Seen] = {}
        self.path = [""]  # the modules that are at work
        self.handles: list[Any] = []
        for name, module in network.named_modules():
            self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.path.append(name)))
            self.handles.append(module.register_forward_hook(self._left))

    def _left(self, *_: Any) -> None:
        self.path.pop()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        node, version = (first.grad_fn, first._version) if first is not None else (None, 0)
        result = function(*args, **(kwargs or {}))
        after = result.grad_fn if isinstance(result, Tensor) else None
        if node in self.seen and after is not None and after is not node:
            changed = first is not None and first._version != version
            self.seen[node].used_by.append((function, self.calls[function], after, changed))
        self.calls[function] += 1
        if after is not None and result.dim() == 4 and after not in self.seen:
            norm = _batch_norm(args, kwargs or {}) if function is F.batch_norm else None
            self.seen[after] = _Seen(tuple(result.shape[1:]), self.path[-1], norm)
        return result


def _batch_norm(args: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Returns weight and bias of F.batch_norm(input, running_mean, running_var, weight, bias, ...)."""
    names = ("input", "running_mean", "running_var", "weight", "bias")
    arguments = {**dict(zip(names, args, strict=False)), **given}
    return arguments.get("weight"), arguments.get("bias")


def find_feature_points(classifier: Classifier, name: str) -> tuple[FeaturePoint, ...]:
    """The ends of the stages of a network, a stage being what works at one resolution, stem and head left out.

    Where a stage ends with an activation (ResNet: after the addition; DenseNet: the BatchNorm after the block): what
    that activation gets. Where its blocks end linearly (MobileNetV2, EfficientNet): the last block's output. `name`: of
    the network, for the message. Raises UserError, with the reason, where there are not two such points at least.
    """
    watch = _Watch(classifier.network)
    start, logits = _watch(classifier, name, watch)
    points = _choose(_graph(start.grad_fn, logits.grad_fn), watch.seen)
    if len(points) < STAGES:
        raise UserError(
            f"--features: in {name} {len(points)} ends of stages were found, at least {STAGES} are needed: maps "
            "(B, C, H, W) of falling resolution that everything passes through, before an activation or after a linear "
            "block"
        )
    return points


def _watch(classifier: Classifier, name: str, watch: "_Watch | _Layers") -> tuple[Tensor, Tensor]:
    """Returns images and logits of a forward pass in eval mode that `watch` has seen. Raises UserError."""
    network, size = classifier.network, classifier.spec.size
    training = {module: module.training for module in network.modules()}
    network.eval()
    noise = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = noise.to(classifier.mean.device)
    try:
        with torch.enable_grad(), watch:
            images = classifier.normalise(pixels).requires_grad_()  # its calls count as well, as in FeatureExtractor
            start = images + 0
            logits = network(start)
            if not isinstance(logits, torch.Tensor):
                raise TypeError(f"it returns a {type(logits).__name__}, not logits")
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--features: {name} could not be watched at work ({error!r:.160})") from None
    finally:
        for handle in watch.handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return start, logits


def find_embedding_point(classifier: Classifier, name: str) -> FeaturePoint:
    """Returns where the last layer gets its input, (B, D), or (B, D, 1, 1) as a convolution has it.

    That is before a dropout which stands ahead of it: what is compared with the teacher should not be drawn.
    `name`: of the network, for the message. Raises UserError where the last layer is no such one.
    """
    layers = _Layers()
    _watch(classifier, name, layers)
    shape = layers.last.shape if layers.last else ()
    if not layers.last or shape[1:] not in ((), (1, 1)):
        raise UserError(f"--features: {name} has no last layer that gets one vector an image: its input is {shape}")
    return replace(layers.last, shape=shape[:1])


class _Layers(TorchFunctionMode):
    """Notes the last call of a linear layer or convolution on what comes from the images, or of a dropout before it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Any] = Counter()
        self.last: FeaturePoint | None = None
        self.dropout: tuple[int, bool, Tensor] | None = None  # the last: its call, whether in place, what it returned
        self.handles: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.dropout:
            self.dropout = self.calls[function], bool((kwargs or {}).get("inplace")), result
        if function in (F.linear, F.conv2d, torch.conv2d) and args[0].grad_fn is not None:
            self.last = FeaturePoint(
                function, self.calls[function], "what the last layer gets", tuple(args[0].shape[1:])
            )
            if self.dropout and self.dropout[2].grad_fn is args[0].grad_fn:
                call, in_place, _ = self.dropout
                self.last = replace(self.last, function=F.dropout, call=call, overwritten=in_place)
        self.calls[function] += 1
        return result


@dataclass
class _Graph:
    """The autograd nodes of a forward pass that depend on the images."""

    trunk: list[Any]  # those that every path from images to logits goes through, in order
    before: dict[Any, list[Any]]  # of each node those that its inputs come from
    depth: dict[Any, int]  # of each node the longest path from the images


def _graph(images: Any, last: Any) -> _Graph:
    """The graph from the images' autograd node to the logits', `last`."""
    order: list[Any] = []
    marked: set[Any] = set()
    stack = [(last, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in marked:
            marked.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None and n not in marked]
    reached = {images}
    before: dict[Any, list[Any]] = {images: []}
    for node in order:  # leaves out the parameters
        inputs = [n for n, _ in node.next_functions if n in reached]
        if inputs and node is not images:
            reached.add(node)
            before[node] = inputs
    path = [node for node in order if node in reached]
    depth: dict[Any, int] = {}
    for node in path:
        depth[node] = 1 + max((depth[n] for n in before[node]), default=0)
    # a node is passed by no other path where no edge leads over it, in an order in which all edges lead forward
    position = {node: k for k, node in enumerate(path)}
    farthest = [0] * len(path)
    for node, inputs in before.items():
        for n in inputs:
            farthest[position[n]] = max(farthest[position[n]], position[node])
    trunk, reach = [], 0
    for k, node in enumerate(path):
        if reach <= k:
            trunk.append(node)
        reach = max(reach, farthest[k])
    return _Graph(trunk, before, depth)


def _choose(graph: _Graph, seen: dict[Any, _Seen]) -> tuple[FeaturePoint, ...]:
    """One point for each resolution at which two convolutions at least work."""
    convolutions = [node for node in graph.before if "Convolution" in node.name() and node in seen]

    def is_stage(node: Any) -> bool:
        size, depth = seen[node].shape[1:], graph.depth[node]
        return sum(seen[n].shape[1:] == size and graph.depth[n] <= depth for n in convolutions) > 1

    deepest = max((graph.depth[node] for node in graph.before if node.name().startswith(LAYERS)), default=0)
    linear: dict[tuple[int, ...], Any] = {}
    active: dict[tuple[int, ...], Any] = {}
    for node in graph.trunk[1:]:  # without the images themselves
        if node.name().startswith(POOLED) or graph.depth[node] >= deepest:
            break
        if node not in seen or not is_stage(node):
            continue
        tensor = seen[node]
        after = [use[2] for use in tensor.used_by]
        ends = "BatchNorm" in node.name() or node.name().startswith("Add")
        if any(use[0] in ACTIVATIONS for use in tensor.used_by):
            if all(n in graph.trunk for n in after):
                active[tensor.shape[1:]] = node
        elif ends and _lasting(tensor) and all(n.name().startswith(LINEAR) for n in after):
            linear[tensor.shape[1:]] = node
    chosen = {**active, **linear}
    return tuple(_feature_point(chosen[size], graph, seen) for size in sorted(chosen, reverse=True))


def _lasting(tensor: _Seen) -> list[tuple[Any, int, Any, bool]]:
    """The uses of a tensor but for additions, of which there may be others in training, where blocks are dropped."""
    return [use for use in tensor.used_by if not use[2].name().startswith("Add")]


def _feature_point(node: Any, graph: _Graph, seen: dict[Any, _Seen]) -> FeaturePoint:
    tensor = seen[node]
    function, call, _, overwritten = ([use for use in tensor.used_by if use[0] in ACTIVATIONS] or _lasting(tensor))[0]
    norms = [n for n in (node, *graph.before[node]) if n in seen and seen[n].batch_norm]
    norm = max(norms, key=graph.depth.__getitem__, default=None)  # of the block, not of its shortcut
    scale, shift = seen[norm].batch_norm or (None, None) if norm else (None, None)
    kind = f"before {_name(function)}" if function in ACTIVATIONS else "linear"
    channels, height, width = tensor.shape
    where = f"{tensor.where or 'the network'}, {kind}"
    return FeaturePoint(function, call, where, (channels, height, width), scale, shift, overwritten)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function)).rstrip("_")
