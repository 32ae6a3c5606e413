"""How fast photos come: our views by each decoder, and torchvision's ImageFolder as its examples use it, in turn.

    python scripts/benchmark_loader.py DATA --workers 2 --rounds 3

DATA: as for train.sh; its train/ is read once before, so that the disk plays no part. Both sides have the same number
of worker processes, crop at random to 224 pixels, flip, and put 64 photos into a batch; ImageFolder's are normalised
float32, ours uint8, normalised on the device. Rates are those of the third batch to the last.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import option, validate  # noqa: E402

SIZE, BATCH, LEFT_OUT = 224, 64, 2
OURS = ("torchvision", "pillow", "simplejpeg")


@dataclass(frozen=True)
class Loading:
    """The flags of this script."""

    data: str | None = option(None, "directory with train/CLASS/* and val/CLASS/* images", group="what", flags=("-d",))
    workers: int = option(2, "processes that decode", group="how", flags=("-j",), least=1, most=256)
    rounds: int = option(3, "times that each is measured", group="how", least=1)

    def __post_init__(self) -> None:
        validate(self)


def image_folder(data: str, workers: int) -> Iterator[int]:
    """The sizes of the batches of torchvision's pipeline."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    folder = datasets.ImageFolder(str(Path(data) / "train"), transforms.Compose(steps))
    for images, _ in DataLoader(folder, BATCH, shuffle=True, num_workers=workers):
        yield len(images)


def ours(data: str, workers: int, decoder: str) -> Iterator[int]:
    """The sizes of the batches of our views."""
    import torch

    from distill.models.classifier import InputSpec
    from imagenet.data import load_data, prepare
    from imagenet.loader import Workers
    from imagenet.recipes import STANDARD

    recipe, cpu = replace(STANDARD, batch_size=BATCH, decoder=decoder), torch.device("cpu")
    with Workers(workers) as pool:
        training, _ = prepare(
            load_data(data, pool), recipe, InputSpec(SIZE, (0, 0, 0), (1, 1, 1), 256), None, pool, cpu
        )
        for batch in training.batches(0):
            yield len(batch.images)


def rate(sizes: Iterator[int]) -> float:
    """Images a second, without the first batches, which wait for the workers to start."""
    for _ in range(LEFT_OUT):
        if next(sizes, None) is None:
            raise UserError(f"too few photos: it takes {LEFT_OUT + 1} batches of {BATCH} at least")
    start = time.perf_counter()
    images = sum(sizes)
    return images / (time.perf_counter() - start)


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Loading(), prog="benchmark_loader.py", description=__doc__ or "", positional="data")
    if not options.data:
        raise UserError("DATA is missing: the directory that holds train/CLASS/* and val/CLASS/* images")
    names = ["ImageFolder", *OURS]
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        names.remove("simplejpeg")
    found: dict[str, list[float]] = {name: [] for name in names}
    for file in (Path(options.data) / "train").rglob("*.*"):
        file.read_bytes()
    for _ in range(options.rounds):
        for name in names:
            sizes = (
                ours(options.data, options.workers, name)
                if name in OURS
                else image_folder(options.data, options.workers)
            )
            found[name].append(rate(sizes))
    print("| pipeline | images/s per worker | times ImageFolder |\n|---|---|---|")
    for name, rates in found.items():
        ratios = [rate / base for rate, base in zip(rates, found["ImageFolder"], strict=True)]
        shown = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        title = name if name == "ImageFolder" else f"ours, {name}"
        print(f"| {title} | {median(rates) / options.workers:.0f} | {shown} |")


if __name__ == "__main__":
    cli.run(main)
