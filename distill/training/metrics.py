"""Counting what a network gets right, on its device, without a synchronisation per step."""

import torch
from torch import Tensor


class Tally:
    """Sums over images: how many, their loss in nats, how many right, how many within the five largest logits, and
    further named `parts` of the loss. `sums` is one float64 tensor, so that it fits a checkpoint.
    """

    def __init__(self, device: torch.device, parts: tuple[str, ...] = ()) -> None:
        self.names = ("images", "loss", "accuracy", "top5", *parts)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor, parts: tuple[Tensor, ...] = ()) -> None:
        """Logits (B, C), labels (B,); mean_loss and parts: means over these B images."""
        largest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (largest == labels.view(-1, 1)).double()
        images = torch.full((), float(len(labels)), dtype=torch.float64, device=self.sums.device)
        means = (mean_loss.double(), 100 * hits[:, 0].mean(), 100 * hits.sum(1).mean(), *(p.double() for p in parts))
        self.sums += images * torch.stack([torch.ones_like(images), *means])

    def summary(self) -> dict[str, float]:
        """Means over the images: `loss` and the parts in nats, `accuracy` and `top5` in percent. Synchronises."""
        images, *sums = self.sums.tolist()
        means = {name: total / max(images, 1.0) for name, total in zip(self.names[1:], sums, strict=True)}
        return {"images": int(images), **means}
