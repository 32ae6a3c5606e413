"""What a network knows: cross-entropy and accuracies on test images, each seen once by one of the processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.recipe import Options, Recipe
from distill.data.datasets import Images, TestData
from distill.errors import BrokenImage, UserError, out_of_memory
from distill.files import checkpoint
from distill.models.classifier import Classifier
from distill.parallel.processes import any_of, broadcast_buffers, gather, rank, rank_and_world_size, reduce
from distill.run.paths import find_directory
from distill.run.run import Run
from distill.training.metrics import Tally

Settings = TypeVar("Settings", bound=Options)


@dataclass(frozen=True)
class Evaluation:
    """loss in nats; accuracy, top5 in percent; predictions int64 (N,) on the CPU."""

    loss: float
    accuracy: float
    top5: float
    images: int
    seconds: float
    predictions: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Returns accuracy, top5, loss, images and images_per_second."""
        rate = self.images / max(self.seconds, 1e-9)
        named = {"accuracy": self.accuracy, "top5": self.top5, "loss": self.loss}
        return {**named, "images": self.images, "images_per_second": rate}

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.2f} %  top-5 {self.top5:.2f} %  loss {self.loss:.4f}  images {self.images}  "
            f"images/s {self.images / max(self.seconds, 1e-9):.0f}"
        )


class EvaluationStopped(Exception):
    """`stop` asked evaluate() to end before the last image."""


def raise_broken(broken: dict[str, str]) -> None:
    """Raises BrokenImage on every process if one of them has met images that cannot be decoded, with all of them."""
    if any_of(bool(broken))[0]:
        error = BrokenImage({file: cause for files in gather(broken) for file, cause in files.items()})
        error.already_reported = rank() > 0
        raise error


@torch.no_grad()
def evaluate(network: Classifier, test: TestData, stop: Callable[[], bool] = lambda: False) -> Evaluation:
    """Cross-entropy and accuracies of `network` in eval mode.

    Each process takes its share of the images, each image is seen once, and every process gets the whole result. Raises
    EvaluationStopped, and BrokenImage on every process.
    """
    device = network.mean.device
    tally, start = Tally(device), time.perf_counter()
    predictions = [torch.empty(0, dtype=torch.int64, device=device)]
    broadcast_buffers(network)
    network.eval()
    broken: dict[str, str] = {}
    try:
        for images, labels in test.batches(*rank_and_world_size()):
            if stop():
                break
            logits = _logits(network, images)
            tally.add(logits, labels, F.cross_entropy(logits, labels))
            predictions.append(logits.argmax(1))
    except BrokenImage as error:
        broken = error.files
    raise_broken(broken)
    if any_of(stop())[0]:
        raise EvaluationStopped
    reduce(tally.sums)
    summary, everything = tally.summary(), torch.cat(gather(torch.cat(predictions).cpu()))
    seconds = time.perf_counter() - start
    return Evaluation(
        summary["loss"], summary["accuracy"], summary["top5"], int(summary["images"]), seconds, everything
    )


def _logits(network: Classifier, images: Tensor) -> Tensor:
    """Returns the logits of `images`, computed in two halves where the memory does not suffice for all at once."""
    try:
        return network(images)  # type: ignore[no-any-return]
    except (RuntimeError, MemoryError) as error:
        if len(images) == 1 or not out_of_memory(error):
            raise
    return torch.cat([_logits(network, part) for part in images.tensor_split(2)])


def to_evaluate(options: Settings, recipe: Recipe, data: Images) -> Settings:
    """Returns `options` whose init is what --evaluate asks for: --resume, --init, or the run's last checkpoint.

    Raises UserError where the directory of the run holds another one, or none.
    """
    if not options.evaluate:
        return options
    if options.resume or options.init:
        print(f"evaluating {options.resume or options.init}")
        return replace(options, init=options.resume or options.init)
    run = Run(find_directory(options, recipe, data.name, data.digest), recipe, options)
    run.check()
    file = run.path / checkpoint.LAST
    if not file.exists():
        raise UserError(f"--evaluate: there is no {file}; name a file by --init FILE, or evaluate it by evaluate.py")
    print(f"evaluating {file}")
    return replace(options, init=str(file))


def evaluate_student(student: Classifier, test: TestData) -> dict[str, Any]:
    """--evaluate: the accuracy of `student` on the test images, printed."""
    evaluation = evaluate(student, test)
    print(evaluation)
    return evaluation.to_dict()


@torch.no_grad()
def seconds_per_image(network: Classifier, images: Tensor) -> float:
    """Roughly the seconds that a training step takes per image: three times a forward pass, after one that warms up."""
    for _ in range(2):
        start = time.perf_counter()
        network.train()(images).sum().item()  # waits for the device
    return 3 * (time.perf_counter() - start) / len(images)
