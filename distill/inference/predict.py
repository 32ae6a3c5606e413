"""What a network says to files of images."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.errors import BrokenImage
from distill.models.classifier import Classifier


class Predicted(NamedTuple):
    """A file with the probabilities of its classes, float32 (C,), or with the reason why it cannot be read."""

    file: str
    probabilities: Tensor | None
    broken: str = ""


@torch.no_grad()
def predict(
    classifier: Classifier, read: Callable[[Sequence[str]], Iterator[Tensor]], files: Sequence[str], batch_size: int
) -> Iterator[Predicted]:
    """Yields what `classifier` says to each file; broken ones come before the part that they were found with.

    read: files -> their images in parts, as Task.read_files yields them. batch_size: images at a time, at most.
    """
    classifier.eval()
    device, left = classifier.mean.device, list(files)
    while left:
        done = 0
        try:
            for images in read(left):
                parts = [classifier(part.to(device)).softmax(1).cpu() for part in torch.split(images, batch_size)]
                for probabilities in torch.cat(parts):
                    yield Predicted(left[done], probabilities)
                    done += 1
            return
        except BrokenImage as error:
            yield from (Predicted(file, None, cause) for file, cause in error.files.items())
            left = [file for file in left[done:] if file not in error.files]
