"""How large a network is, beside another one.

    python scripts/model_size.py --dataset cifar10 --arch resnet152 --vs efficientnet_b0
    python scripts/model_size.py --dataset imagenet --arch resnet152 --vs efficientnet-b0

parameters     learnable numbers
activations    numbers that convolutions and BatchNorms put out for one image
size           their sum: what the original repository called the size of a network
MACs           multiplications with additions in convolutions and matrix products, for one image
float32        bytes of the state_dict on disk; float16: with half as many for each floating-point number
image, batch   time of a forward pass here, float32, channels_last: the median of --rounds, both networks in turn
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.options import option, validate  # noqa: E402
from scripts.dataset import DATASETS, Dataset  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """The flags of this script."""

    dataset: str = option("cifar10", "which networks", group="what", choices=tuple(DATASETS))
    arch: str = option("resnet152", "the network", group="what", flags=("-a",))
    vs: str | None = option(
        None,
        "the one beside it (default: efficientnet_b0, of imagenet efficientnet-b0); the same name: none",
        group="what",
    )
    classes: int = option(0, "outputs; 0: 10, of imagenet 1000", group="what", least=0)
    batch_size: int = option(64, "images of a batch", group="how", flags=("-b",), least=1)
    rounds: int = option(5, "how often the times are taken", group="how", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="how")
    json: str | None = option(None, "write the figures to this file", group="how")

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Size:
    """Of one network; numbers as in the table, seconds for times."""

    arch: str
    parameters: int
    activations: int
    size: int
    macs: int
    bytes_float32: int
    bytes_float16: int
    seconds_image: float
    seconds_batch: float


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Sizes(), prog="model_size.py", description=__doc__ or "")
    cli.check_file(options.json)
    from distill.parallel.devices import choose_precision, describe_device, devices

    device = devices(options.device)[0]
    choose_precision("float32", device)  # the times are of float32, not of TF32
    dataset = DATASETS[options.dataset]
    other = options.vs or dataset.recipe_type().arch
    classes = options.classes or dataset.num_classes
    networks = {arch: build(arch, dataset, classes, device) for arch in (options.arch, other)}
    found = measure(networks, options.batch_size, options.rounds)
    print(f"{options.dataset}, {classes} classes, {describe_device(device)}, batch {options.batch_size}")
    show(found)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(size) for size in found], indent=2) + "\n")


def build(arch: str, dataset: Dataset, classes: int, device: Any) -> Any:
    """Returns the classifier of that name, with random weights, in eval mode."""
    from distill.models.classifier import Classifier

    network = dataset.module("models").find(arch)
    return Classifier(network.build(num_classes=classes), network.spec).to(device).eval()


def measure(networks: dict[str, Any], batch_size: int, rounds: int) -> list[Size]:
    """Count and time the networks (name -> Classifier), in turn."""
    times: dict[tuple[str, int], list[float]] = {}
    for round_ in range(rounds + 1):  # the first one warms up
        for arch, network in networks.items():
            for images_each in (1, batch_size):
                passed = seconds(network, images_each)
                if round_:
                    times.setdefault((arch, images_each), []).append(passed)
    found = []
    for arch, network in networks.items():
        parameters, activations, macs = count(network)
        weights = network.network.state_dict()
        half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        image, batch = (statistics.median(times[arch, n]) for n in (1, batch_size))
        disk = (on_disk(weights), on_disk(half))
        found.append(Size(arch, parameters, activations, parameters + activations, macs, *disk, image, batch))
    return found


def count(network: Any) -> tuple[int, int, int]:
    """(parameters, activations, MACs) of a Classifier, for one image."""
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from distill.models.classifier import count_parameters

    outputs: list[int] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [
        module.register_forward_hook(lambda _module, _given, out: outputs.append(out.numel()))
        for module in network.network.modules()
        if isinstance(module, kinds)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused kernels hide the products of attention from the counter
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(images(network, 1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for handle in handles:
        handle.remove()
    return count_parameters(network.network), sum(outputs), counter.get_total_flops() // 2


def images(network: Any, count: int) -> Any:
    import torch

    size = network.spec.size
    return torch.zeros(count, size, size, 3, dtype=torch.uint8, device=network.mean.device)


def seconds(network: Any, count: int) -> float:
    """Of a forward pass of `count` images."""
    import torch

    batch = images(network, count)
    with torch.no_grad():
        start = time.perf_counter()
        network(batch).sum().item()  # waits for the device
        return time.perf_counter() - start


def on_disk(weights: dict[str, Any]) -> int:
    """Bytes of the file that torch.save makes of them."""
    import torch

    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.tell()


def show(found: Sequence[Size]) -> None:
    """The table, and the share that the second network has of the first."""
    print("| network | parameters | activations | size | MACs | float32 | float16 | image | batch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in found:
        numbers = [f"{n / 1e6:.2f} M" for n in (size.parameters, size.activations, size.size, size.macs)]
        disk = [f"{n / 1e6:.1f} MB" for n in (size.bytes_float32, size.bytes_float16)]
        times = [f"{1000 * s:.1f} ms" for s in (size.seconds_image, size.seconds_batch)]
        print(f"| {size.arch} | {' | '.join([*numbers, *disk, *times])} |")
    if len(found) == 2:
        pairs = zip(list(asdict(found[1]).values())[1:], list(asdict(found[0]).values())[1:], strict=True)
        print(f"| share | {' | '.join(f'{100 * small / big:.2f} %' for small, big in pairs)} |")


if __name__ == "__main__":
    cli.run(main)
