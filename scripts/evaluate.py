"""Evaluate any checkpoint, ours or foreign, on the test images.

    python scripts/evaluate.py --arch resnext29_32x8d --checkpoint FILE --data DIR [--json FILE]

Prints: accuracy 92.34 %  top-5 99.71 %  loss 0.2512  images 10000  images/s 412
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli  # noqa: E402
from distill.recipe import UserError, knob, validate  # noqa: E402


@dataclass(frozen=True)
class Evaluate:
    """The flags of this script."""

    arch: str | None = knob(None, "the network's architecture (not needed for ours)", group="what", flags=("-a",))
    checkpoint: str | None = knob(None, "its weights: last.pt of a run, or a file of others", group="what")
    data: str | None = knob(None, "'sample', a directory, or a .npz file (default: data/cifar10)", group="what")
    split: str = knob("test", "which images", group="what", choices=("test", "train"))
    batch_size: int = knob(256, "images at a time", group="how", flags=("-b",), least=1)
    precision: str = knob("float32", "of the forward pass", group="how", choices=("float32", "bfloat16"))
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", group="how")
    workers: int = knob(2, "threads that decode a folder of images", group="how", flags=("-j",), least=0, most=256)
    skip_bad_images: bool = knob(False, "leave out broken image files, up to 0.1 %% or one", group="how")
    json: str | None = knob(None, "write accuracy, top5, loss, images, images_per_second to this file", group="how")

    def __post_init__(self) -> None:
        validate(self)


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Evaluate(), prog="evaluate.py", description=__doc__ or "")
    if not options.checkpoint:
        raise UserError("--checkpoint is needed; --help shows an example")
    if options.json and not Path(options.json).resolve().parent.is_dir():
        raise UserError(f"--json {options.json}: there is no such directory")
    from cifar10.data import load_data
    from cifar10.models import CIFAR_INPUT, MODELS
    from distill import checkpoint
    from distill.engine import evaluate
    from distill.parallel import choose_precision, start
    from distill.registry import Classifier
    from distill.views import EvaluationSet

    device = start(options.device)
    weights = checkpoint.load_weights(Path(options.checkpoint))
    named = options.arch or checkpoint.load_arch(Path(options.checkpoint))
    if not named:
        raise UserError(f"--arch is needed: {options.checkpoint} does not say what network it is of")
    arch = MODELS.resolve(named)
    data = load_data(options.data, workers=options.workers, skip_bad_images=options.skip_bad_images)
    if options.split == "train" and not data.labelled:
        raise UserError("the training images have no labels to evaluate on")
    network = MODELS.build(arch, len(data.classes))
    checkpoint.apply_weights(network, weights, options.checkpoint)
    images, labels = {
        "test": (data.test_images, data.test_labels),
        "train": (data.train_images, data.train_labels),
    }[options.split]
    classifier = Classifier(network, CIFAR_INPUT, choose_precision(options.precision, device)).to(device)
    found = evaluate(classifier, EvaluationSet(images.to(device), labels.to(device), options.batch_size))
    print(found)
    if options.json:
        checkpoint.write_atomically(Path(options.json), (json.dumps(found.to_dict()) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
