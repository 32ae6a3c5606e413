"""Counts what a network gets right, on its device, without a synchronisation per step."""

import torch
from torch import Tensor


class Tally:
    """Sums over images: how many, their loss in nats, accuracies, and further named terms of the loss.

    `sums` is one float64 tensor, so that it fits a checkpoint.
    """

    def __init__(self, device: torch.device, loss_terms: tuple[str, ...] = ()) -> None:
        self.names = ("images", "loss", "accuracy", "top5", *loss_terms)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor, loss_terms: tuple[Tensor, ...] = ()) -> None:
        """Adds B images: logits (B, C), labels (B,); mean_loss and loss_terms are means over them."""
        largest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (largest == labels.view(-1, 1)).double()
        images = torch.full((), float(len(labels)), dtype=torch.float64, device=self.sums.device)
        accuracies = 100 * hits[:, 0].mean(), 100 * hits.sum(1).mean()
        means = (mean_loss.double(), *accuracies, *(term.double() for term in loss_terms))
        self.sums += images * torch.stack([torch.ones_like(images), *means])

    def summary(self) -> dict[str, float]:
        """Returns means over the images: `loss` and its terms in nats, accuracies in percent. Waits for the device."""
        images, *sums = self.sums.tolist()
        means = {name: total / max(images, 1.0) for name, total in zip(self.names[1:], sums, strict=True)}
        return {"images": int(images), **means}
