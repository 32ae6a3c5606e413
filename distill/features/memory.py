"""What contrastive distillation remembers of the whole training set: an embedding of each image, of both networks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.data.datasets import Batch
from distill.data.draws import uniforms_of
from distill.errors import UserError
from distill.parallel.processes import gather_rows

ROWS = 16  # images of a batch whose negatives are looked up at a time, where all products would be more


class Negatives:
    """For each image and epoch K images of other classes, drawn with replacement by (seed, epoch, image) alone."""

    def __init__(self, labels: Tensor, indices: NDArray[np.int64], count: int, seed: int) -> None:
        """labels: (N,) of all images; indices: those that are trained on. Raises UserError for a single class."""
        classes = labels.cpu().numpy()[indices]
        self._by_class = indices[np.argsort(classes, kind="stable")]
        counts = np.bincount(classes)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._count, self._seed = count, seed
        if counts.max() == len(indices):
            raise UserError("--features crd tells an image from those of other classes, and the data has one class")

    def of(self, batch: Batch) -> Tensor:
        """Returns int64 (B, K) on the CPU."""
        rows = zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)
        return torch.from_numpy(np.stack([self._row(index, label, batch.epoch) for index, label in rows]))

    def _row(self, index: int, label: int, epoch: int) -> NDArray[np.int64]:
        start, end = self._starts[label], self._ends[label]
        columns = -(-self._count // 4) * 4
        drawn = uniforms_of(self._seed, "negatives", epoch, index, columns)[: self._count]
        places = (drawn * (len(self._by_class) - (end - start))).astype(np.int64)
        return self._by_class[places + np.where(places >= start, end - start, 0)]


class ContrastMemory(nn.Module):
    """An embedding of each of N images, of the student and of the teacher, and the scale of the scores.

    It is state of the run: saved and continued with it, the same in every process.
    """

    student: Tensor
    teacher: Tensor
    scale: Tensor

    def __init__(self, count: int, size: int, T: float, momentum: float, seed: int) -> None:
        """Starts from uniform numbers as the authors' does, in +-1 / sqrt(size / 3)."""
        super().__init__()
        self.T, self.momentum = T, momentum
        bound = (size / 3) ** -0.5
        generator = torch.Generator().manual_seed(seed)
        for name in ("student", "teacher"):
            self.register_buffer(name, (torch.rand(count, size, generator=generator) * 2 - 1) * bound)
        self.register_buffer("scale", torch.zeros(2))  # 0 until the first batch has set it

    def scores(
        self, student: Tensor, teacher: Tensor, indices: Tensor, negatives: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Returns exp(embedding . memory / T) over the scale, (B, 1 + K), of student and of teacher.

        student, teacher: embeddings (B, D). Each is compared with the memory of the other network, at the image itself
        first, then at its negatives (B, K). The scale is the mean of the first batch's, times the `count` of the images
        that are trained on.
        """
        rows = torch.cat([indices.view(-1, 1), negatives], dim=1).to(student.device)
        found = []
        for number, (vectors, memory) in enumerate(((student, self.teacher), (teacher, self.student))):
            values = torch.exp(_products(vectors, memory, rows) / self.T)
            if not self.scale[number]:
                self.scale[number] = gather_rows(values.detach().mean().view(1)).mean() * count
            found.append(values / self.scale[number].clone())
        return found[0], found[1]

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, indices: Tensor) -> None:
        """Moves the memories of the images `indices` (B,) of all processes towards their embeddings, of length 1."""
        rows = gather_rows(indices.to(student.device))
        for memory, vectors in ((self.student, student), (self.teacher, teacher)):
            moved = self.momentum * memory[rows] + (1 - self.momentum) * gather_rows(vectors.detach())
            memory[rows] = nn.functional.normalize(moved, dim=1)


def _products(vectors: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """Returns (B, K): vectors (B, D) times the rows (B, K) of memory (N, D), by the cheaper of two ways."""
    if len(memory) <= 4 * rows.shape[1]:
        return (vectors @ memory.clone().T).gather(1, rows)  # backward needs it as it was, and update() comes before
    parts = zip(vectors.split(ROWS), rows.split(ROWS), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([torch.bmm(memory[some], part.unsqueeze(2)).squeeze(2) for part, some in parts])
