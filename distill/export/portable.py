"""A classifier as others call it: pixels in [0, 1] go in, and its file says what they are to be."""

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from distill.models.classifier import Classifier


class Portable(nn.Module):
    """The network of a classifier with its normalisation inside, and without its resizing."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.network
        self.register_buffer("mean", torch.tensor(classifier.spec.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(classifier.spec.std).view(1, 3, 1, 1))
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image: float32 (B, 3, S, S) in [0, 1] -> logits and probabilities, both (B, C)."""
        logits = self.network((image - self.mean) / self.std)
        return logits, logits.softmax(1)


@dataclass(frozen=True)
class Description:
    """What a file says of its network.

    accuracy: percent of `accuracy_images` test images, in float32; accuracy_int8: of all of them after quantisation.
    resized: pixels of the short side before the centre of `size` pixels is cut out; `size` itself where a whole image
    is resized to a square. first_resized: pixels of the square that a whole image is resized to before that, bicubic;
    None where it is not; what comes of it is resized to `size` in floats, and limited to 0 to 255, not rounded. input:
    what the network takes. commit: of the run where that is known, else of what wrote the file.
    """

    arch: str
    classes: tuple[str, ...]
    size: int
    resized: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    accuracy: float
    accuracy_images: int
    data: str
    commit: str | None
    accuracy_int8: float | None = None
    first_resized: int | None = None
    input: str = "RGB, float32 in [0, 1], (N, 3, size, size); mean and std are applied inside"

    def texts(self) -> dict[str, str]:
        """Returns the fields as text: numbers and names as they are, lists as JSON."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}

    def json(self) -> str:
        """Returns the fields as JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}, indent=2)
