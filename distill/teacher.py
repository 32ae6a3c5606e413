"""The frozen teacher: in eval mode, without gradients, its answers rounded to float16; and what it knows."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from distill import checkpoint
from distill.parallel import spread_inference
from distill.registry import Classifier
from distill.views import Batch

FLOAT16_MAX = 65504.0


class Teacher:
    """Answers batches with logits. It cannot move: `check_untouched` raises if a parameter or buffer ever did.

    A logit is rounded to float16 before any use, so that a run does not depend on whether an answer is computed or
    comes from a store (design: the teacher answers each view once). `device_name`: where one process has several GPUs,
    as of parallel.devices, all of them answer.
    """

    def __init__(self, network: Classifier, device_name: str = "cpu") -> None:
        self._network = network.eval().requires_grad_(False)
        self._spread = spread_inference(network, device_name)
        self.digest = self._content()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """images: uint8 (B, H, W, 3) -> float32 (B, C) with values that float16 has."""
        answer: Tensor = self._spread(images)
        return answer.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float()

    def __call__(self, batch: Batch) -> Tensor:
        return self.logits(batch.images)

    def check_untouched(self) -> None:
        """Raises RuntimeError if parameters or buffers (BatchNorm's running statistics) differ from the start."""
        if self._content() != self.digest:
            raise RuntimeError("the teacher has changed during the run: this is a bug, its results are void")

    def _content(self) -> str:
        return checkpoint.digest(self._network.network.state_dict())

    def test_logits(self, batches: Iterable[tuple[Tensor, Tensor]], data_digest: str, cache: Path) -> Tensor:
        """Logits (N, C) of the test images, computed once per teacher, data and precision and kept under `cache`.

        `batches` yields (images, labels). A damaged file of an earlier call is named and made anew.
        """
        precision = str(self._network.precision).removeprefix("torch.")
        name = f"{self.digest[:24]}-{data_digest[:24]}-{precision}.pt"
        path = cache / name
        if path.exists():
            try:
                return checkpoint.load(path)["logits"].float()  # type: ignore[no-any-return]
            except checkpoint.CheckpointError as error:
                print(f"{error}; measuring the teacher again")
        answers = torch.cat([self.logits(images).cpu() for images, _ in batches])
        checkpoint.save_cache(path, {"logits": answers.half()})
        return answers


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` (N, C) whose largest entry is at `labels` (N,)."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def agreement(predictions: Tensor, other: Tensor) -> float:
    """Percent of images (N,) for which two networks predict the same class."""
    return 100 * (predictions == other).double().mean().item()


def chance_warning(accuracy: float, classes: int) -> str | None:
    """A line of warning for a teacher that is hardly better than guessing: within a tenth of the way to 100 %."""
    chance = 100 / classes
    if accuracy >= chance + 0.1 * (100 - chance):
        return None
    found = f"the teacher's test accuracy, {accuracy:.2f} %, is near chance ({chance:.2f} %)"
    return f"warning: {found}; wrong weights or data?"
