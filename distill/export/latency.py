"""How long one image takes."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from distill.config.environment import cores
from distill.export import onnx_file
from distill.export.portable import Portable
from distill.models.classifier import Classifier

ROUNDS = 50
WARM_UP = 5


class Times(NamedTuple):
    """Milliseconds over ROUNDS; `fastest` is what a machine that is busy with other work can do."""

    median: float
    fastest: float


def latencies(classifier: Classifier, files: Mapping[str, Path]) -> dict[str, dict[int, Times]]:
    """Returns what one image takes by title and number of threads (one, all): `torch`, and each of the ONNX files.

    They are timed in turn.
    """
    size, portable = classifier.spec.size, Portable(classifier)
    image, before = torch.rand(1, 3, size, size), torch.get_num_threads()
    found: dict[str, dict[int, Times]] = {title: {} for title in ("torch", *files)}
    for threads in sorted({1, cores()}):
        torch.set_num_threads(threads)
        ways: dict[str, Callable[[], object]] = {"torch": lambda: portable(image)}
        for title, path in files.items():
            run = onnx_file.load(path, threads)
            ways[title] = lambda run=run: run(image)  # type: ignore[misc]
        for title, times in _in_turn(ways).items():
            found[title][threads] = times
    torch.set_num_threads(before)
    return found


@torch.inference_mode()
def _in_turn(ways: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
    times: dict[str, list[float]] = {title: [] for title in ways}
    for round_ in range(WARM_UP + ROUNDS):
        for title, way in ways.items():
            start = time.perf_counter()
            way()
            if round_ >= WARM_UP:
                times[title].append(1000 * (time.perf_counter() - start))
    return {title: Times(statistics.median(values), min(values)) for title, values in times.items()}
