"""Evaluate a network on the test images: a checkpoint of ours, a file of others, or ImageNet's published weights.

    python scripts/evaluate.py RUN [--json FILE]                              a run's directory, on its images
    python scripts/evaluate.py --arch resnext29_32x8d --checkpoint FILE --data DIR
    python scripts/evaluate.py --dataset imagenet --arch resnet50 --data DIR [--checkpoint FILE]

Prints: accuracy 92.34 %  top-5 99.71 %  loss 0.2512  images 10000  images/s 412
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import option  # noqa: E402
from scripts.dataset import DATASETS  # noqa: E402
from scripts.trained import InputFlags, dataset_of, print_notes, settings  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluate(InputFlags):
    """The flags of this script."""

    dataset: str | None = option(
        None,
        "small images or photos, and the networks for them (default: those of the run, else cifar10)",
        group="network",
        choices=tuple(DATASETS),
    )
    arch: str | None = option(None, "the network's architecture (not needed for ours)", group="network", flags=("-a",))
    checkpoint: str | None = option(
        None,
        "its weights: a run's directory, or a file (imagenet: default the published ones)",
        group="network",
    )
    weights: str | None = option(
        None,
        "of --checkpoint: raw or ema, where it holds weights and their average; else which of torchvision's, such as "
        "IMAGENET1K_V2",
        group="network",
    )
    data: str | None = option(
        None,
        "'sample', a directory, or a .npz file (default: those of the run, else data/cifar10); imagenet: a directory",
        group="network",
    )
    split: str | None = option(
        None,
        "which images: test (imagenet: val) by default, or train",
        group="network",
        choices=("test", "val", "train"),
    )
    batch_size: int = option(256, "images at a time (cifar10)", group="how", flags=("-b",), least=1)
    precision: str = option("float32", "of the forward pass", group="how", choices=("float32", "bfloat16"))
    decoder: str | None = option(
        None,
        "of photos (default: that of the run, else torchvision)",
        group="how",
        choices=("torchvision", "pillow", "simplejpeg"),
    )
    skip_bad_images: bool = option(False, "leave out broken image files, up to 0.1 %% or one", group="how")
    per_class: bool = option(
        False, "also print the accuracy of each class, and what it is mostly taken for", group="how"
    )
    json: str | None = option(
        None,
        "write accuracy, top5, loss, images, images_per_second (with --per-class: per_class) to this file",
        group="how",
    )


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Evaluate(), prog="evaluate.py", description=__doc__ or "", positional="checkpoint")
    cli.check_file(options.json)
    from distill.inference.trained import find_trained
    from distill.models.network import raw_or_ema

    trained = find_trained(options.checkpoint, raw_or_ema(options.weights)) if options.checkpoint else None
    kind = options.dataset or (dataset_of(trained.recipe) if trained else "cifar10")
    dataset = DATASETS[kind]
    if not options.checkpoint and not dataset.published:
        raise UserError("--checkpoint is needed; --help shows an example")
    if options.split not in (None, "train", dataset.test_split):
        raise UserError(f"--split {options.split}: {dataset.name} has {dataset.test_split} and train")
    if not dataset.published and options.weights not in (None, "raw", "ema"):
        raise UserError(f"--weights must be one of raw, ema for small images, got {options.weights!r}")
    from distill.files import checkpoint
    from distill.parallel.devices import choose_precision
    from distill.training.evaluation import evaluate

    given = trained.weights if trained else None
    arch = options.arch or (given.arch if given else None)
    if not arch:
        of_file = f": {options.checkpoint} does not say what network it is of" if given else ""
        raise UserError(f"--arch is needed{of_file}")
    decoder, data, skips = options.decoder, options.data, options.skip_bad_images
    if trained:  # files are read as the run read them
        decoder, data = decoder or trained.recipe.get("decoder"), data or trained.started_with("data")
        skips = skips or trained.last_start.get("skip_bad_images", False)
    recipe, usual = settings(dataset, options, arch, data=data, decoder=decoder or "torchvision", skip_bad_images=skips)
    with dataset.open(recipe, usual) as task:
        if trained:
            print_notes(trained, task)
        found = task.find_trained(arch, given)
        given = given or task.published(found, "--checkpoint")
        classifier = task.build_classifier(found, given, choose_precision(options.precision, task.device))
        split = "train" if options.split == "train" else "test"
        if split == "train" and not getattr(task.data, "labelled", True):
            raise UserError("the training images have no labels to evaluate on")
        images = task.test_data(found.spec, split, options.batch_size)
        result = evaluate(classifier, images)
        if not given.spec and not given.published:
            task.suggest_normalisation(classifier, result.accuracy, "note", "--mean", "--std")
    print(result)
    figures = result.to_dict()
    if options.per_class:
        figures["per_class"] = by_class(result.predictions, images.labels.cpu(), classifier.classes)
        show(figures["per_class"])
    if options.json:
        checkpoint.write_atomically(Path(options.json), (json.dumps(figures) + "\n").encode())


def by_class(predictions: "Tensor", labels: "Tensor", classes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each class its number of images, its accuracy in percent, and what it is taken for most often.

    Accuracy is None where there are no images, and `taken_for` where none is wrong; `mistaken` is the percent of the
    images that go there. predictions, labels: int64 (N,), on the CPU.
    """
    from distill.report.measures import confused_pairs, confusion

    counts = confusion(predictions, labels, len(classes))
    pairs = {pair.label: pair for pair in reversed(confused_pairs(counts, len(classes) ** 2))}  # the first of each row
    rows = []
    for number, (name, images) in enumerate(zip(classes, counts.sum(1).tolist(), strict=True)):
        row: dict[str, Any] = {"class": name, "images": images}
        row["accuracy"] = 100 * counts[number, number].item() / images if images else None
        row["taken_for"] = classes[pairs[number].predicted] if number in pairs else None
        row["mistaken"] = pairs[number].percent if number in pairs else 0.0
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of by_class as a table."""
    width = max(len(row["class"]) for row in rows)
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2f} %"
        mistaken = f"  mostly taken for {row['taken_for']} ({row['mistaken']:.2f} %)" if row["taken_for"] else ""
        print(f"{row['class']:{width}}  {accuracy:>8}  of {row['images']} images{mistaken}")


if __name__ == "__main__":
    cli.run(main)
