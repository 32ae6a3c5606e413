"""Evaluate a network on the test images: a checkpoint of ours, a file of others, or ImageNet's published weights.

    python scripts/evaluate.py --arch resnext29_32x8d --checkpoint FILE --data DIR [--json FILE]
    python scripts/evaluate.py --dataset imagenet --arch resnet50 --data DIR [--checkpoint FILE]

Prints: accuracy 92.34 %  top-5 99.71 %  loss 0.2512  images 10000  images/s 412
"""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import check_normalisation, option, validate  # noqa: E402


@dataclass(frozen=True)
class Evaluate:
    """The flags of this script."""

    dataset: str = option(
        "cifar10",
        "small images or photos, and the networks for them",
        group="what",
        choices=("cifar10", "imagenet"),
    )
    arch: str | None = option(None, "the network's architecture (not needed for ours)", group="what", flags=("-a",))
    checkpoint: str | None = option(
        None, "its weights: last.pt of a run, or a file of others (imagenet: default the published ones)", group="what"
    )
    weights: str | None = option(
        None,
        "of --checkpoint: raw or ema, where it holds weights and their average; else which of torchvision's, such as "
        "IMAGENET1K_V2",
        group="what",
    )
    class_order: str = option(
        "names",
        "whether names of classes in the file decide which output is which",
        group="what",
        choices=("names", "ignore"),
    )
    mean: str | None = option(
        None, "of pixels in [0, 1] that the network subtracts, one number or three with commas", group="what"
    )
    std: str | None = option(None, "that it divides by then", group="what")
    data: str | None = option(
        None, "'sample', a directory, or a .npz file (default: data/cifar10); imagenet: a directory", group="what"
    )
    split: str | None = option(
        None, "which images: test (imagenet: val) by default, or train", group="what", choices=("test", "val", "train")
    )
    image_size: int | None = option(
        None, "pixels that one of ImageNet's networks sees of small images", group="how", least=16, most=2048
    )
    batch_size: int = option(256, "images at a time (cifar10)", group="how", flags=("-b",), least=1)
    precision: str = option("float32", "of the forward pass", group="how", choices=("float32", "bfloat16"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="how")
    workers: int = option(2, "that decode images", group="how", flags=("-j",), least=0, most=256)
    decoder: str = option("torchvision", "of photos", group="how", choices=("torchvision", "pillow", "simplejpeg"))
    skip_bad_images: bool = option(False, "leave out broken image files, up to 0.1 %% or one", group="how")
    json: str | None = option(None, "write accuracy, top5, loss, images, images_per_second to this file", group="how")

    def __post_init__(self) -> None:
        validate(self)
        check_normalisation(self, "mean", "std")


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Evaluate(), prog="evaluate.py", description=__doc__ or "")
    photos = options.dataset == "imagenet"
    if not options.checkpoint and not photos:
        raise UserError("--checkpoint is needed; --help shows an example")
    if options.split == ("test" if photos else "val"):
        raise UserError(f"--split {options.split}: {options.dataset} has {'val' if photos else 'test'} and train")
    if options.weights and not photos and options.weights not in ("raw", "ema"):
        raise UserError(f"--weights must be one of raw, ema for small images, got {options.weights!r}")
    cli.check_file(options.json)
    from distill.files import checkpoint
    from distill.models import weights
    from distill.parallel.devices import start
    from distill.training.evaluation import evaluate

    device = start(options.device)
    kind = options.weights if options.weights in weights.WHICH else None
    given = weights.load(Path(options.checkpoint), kind) if options.checkpoint else None
    if not (arch := options.arch or (given.arch if given else None)):
        of_file = f": {options.checkpoint} does not say what network it is of" if given else ""
        raise UserError(f"--arch is needed{of_file}")
    with ExitStack() as stack:
        classifier, test = (_photos if photos else _small)(options, arch, given, device, stack)
        found = evaluate(classifier, test)
        if given and not given.spec and not photos:
            from cifar10.teachers import WEAK, compare_normalisations

            if found.accuracy < WEAK:
                print(f"note: {compare_normalisations(classifier, test, '--mean', '--std')}")
    print(found)
    if options.json:
        checkpoint.write_atomically(Path(options.json), (json.dumps(found.to_dict()) + "\n").encode())


def _small(options: Evaluate, arch: str, given: Any, device: Any, _: ExitStack) -> tuple[Any, Any]:
    """The network of small images, with what the file holds, and the images."""
    from cifar10.classes import class_names
    from cifar10.data import load_data
    from cifar10.models import find_trained, resolve
    from distill.data.datasets import TensorTestData
    from distill.models.classifier import Classifier
    from distill.models.network import load_into
    from distill.parallel.devices import choose_precision

    known = find_trained(resolve(arch), given, options.image_size).shown(None, options.mean, options.std)
    data = load_data(options.data, workers=options.workers, skip_bad_images=options.skip_bad_images)
    if options.split == "train" and not data.labelled:
        raise UserError("the training images have no labels to evaluate on")
    network, precision = known.build(num_classes=len(data.classes)), choose_precision(options.precision, device)
    classifier = Classifier(network, known.spec, precision, data.classes)
    load_into(classifier, given, known, class_names(data.classes, options.class_order))
    train = options.split == "train"
    images, labels = (data.train_images, data.train_labels) if train else (data.test_images, data.test_labels)
    return classifier.to(device), TensorTestData(images.to(device), labels.to(device), options.batch_size)


def _photos(options: Evaluate, arch: str, given: Any, device: Any, stack: ExitStack) -> tuple[Any, Any]:
    """The network of photos, with what the file holds or its published weights, and the photos."""
    from distill.models.classifier import Classifier
    from distill.parallel.devices import choose_precision
    from imagenet.data import PhotoTestData, load_data
    from imagenet.loader import Workers
    from imagenet.models import find_trained
    from imagenet.teachers import load_weights

    known = find_trained(arch, options.weights, given).shown(None, options.mean, options.std)
    workers = stack.enter_context(Workers(options.workers))
    data = load_data(options.data, workers, skip_bad_images=options.skip_bad_images)
    network = known.build(num_classes=len(data.classes))
    classifier = Classifier(network, known.spec, choose_precision(options.precision, device), data.classes)
    load_weights(classifier, known, options.checkpoint, given, options.class_order, flag="--checkpoint")
    train = options.split == "train"
    files, labels = (data.train_files, data.train_labels) if train else (data.val_files, data.val_labels)
    return classifier.to(device), PhotoTestData(files, labels, known.spec, workers, device, options.decoder)


if __name__ == "__main__":
    cli.run(main)
