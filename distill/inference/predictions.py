"""What a network says to test images: computed once for its weights and the images, then kept."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.datasets import TestData
from distill.errors import CheckpointError
from distill.files import checkpoint
from distill.models.classifier import Classifier


@dataclass(frozen=True)
class Predictions:
    """logits: float32 (N, C) with values that float16 has; labels, predictions: int64 (N,). All on the CPU.

    `predictions` is the arg max of the logits as they were computed, which rounding may have changed in `logits`.
    """

    logits: Tensor
    labels: Tensor
    predictions: Tensor

    @property
    def accuracy(self) -> float:
        """Percent of the images that are predicted right."""
        return 100 * (self.predictions == self.labels).double().mean().item()

    @property
    def top5(self) -> float:
        """Percent of the images whose label is among the five largest logits."""
        largest = self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices
        return 100 * (largest == self.labels.view(-1, 1)).any(1).double().mean().item()

    @property
    def probabilities(self) -> Tensor:
        """float32 (N, C)."""
        return F.softmax(self.logits, dim=1)


@torch.no_grad()
def predictions_of(classifier: Classifier, test: TestData, data_digest: str, directory: Path) -> Predictions:
    """Returns what `classifier` says to `test`, kept in `directory` for weights, images, precision and kind of device.

    data_digest: of the images, of how they are decoded, and of the network's architecture. A damaged file is named and
    made anew.
    """
    device, name = classifier.mean.device, str(classifier.precision).removeprefix("torch.")
    identity = [
        checkpoint.digest(classifier.network.state_dict()),
        data_digest,
        str(classifier.spec),
        name,
        device.type,
    ]
    path = directory / f"predictions-{checkpoint.digest(identity)[:16]}.pt"
    labels, kept = test.labels.cpu(), None
    if path.exists():
        try:
            kept = checkpoint.load(path)
        except CheckpointError as error:
            print(f"{error}; computing the predictions again")
    if not kept or len(kept["predictions"]) != len(labels):
        classifier.eval()
        parts = [classifier(images).cpu() for images, _ in test.batches()]
        logits = torch.cat(parts)
        kept = {"logits": logits.half(), "predictions": logits.argmax(1)}
        checkpoint.save_cache(path, kept)
    return Predictions(kept["logits"].float(), labels, kept["predictions"])
