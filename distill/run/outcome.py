"""What a run has come to, from its records and its summary: the best epoch, whether it went astray, a line on it."""

from typing import Any

BEST = "best.pt"
ASTRAY = 1000.0  # times the loss that a run began with


def best_epoch(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the largest accuracy on the validation part, the first of equals; None without such a part."""
    validated = [record for record in records if "val_accuracy" in record]
    return max(validated, key=lambda record: record["val_accuracy"]) if validated else None


def diverged(records: list[dict[str, Any]], first_loss: float | None) -> dict[str, Any] | None:
    """Returns the first epoch whose loss is more than a thousand times that of the first step, None if there is none.

    If the first epoch's loss was less than that of the first step it counts instead; only a loss of more than 1 has
    diverged. The result has the epoch's number, its loss, and what the run began with.
    """
    first_losses = [loss for loss in (first_loss, records[0]["train_loss"] if records else None) if loss is not None]
    for record in records:
        if record["train_loss"] > ASTRAY * max(min(first_losses), 1 / ASTRAY):
            return {"epoch": record["epoch"], "train_loss": record["train_loss"], "first_loss": min(first_losses)}
    return None


def format_divergence(astray: dict[str, Any]) -> str:
    """What diverged() has found, in words."""
    return f"the loss of epoch {astray['epoch']} is {astray['train_loss']:.4g}, of {astray['first_loss']:.4g} at first"


def describe(summary: dict[str, Any], kept: int | None) -> str:
    """A run's result in a line. kept: the epoch whose weights are in best.pt."""
    epochs = f"{summary['epochs']} epoch{'s' if summary['epochs'] > 1 else ''}"
    line = f"{summary['arch']}: test accuracy {summary['test_accuracy']:.2f} % after {epochs}"
    if best := summary.get("best_epoch"):
        file = BEST if kept == best["epoch"] else "the best epoch, whose weights are not here"
        line += f" ({file}, by {best['val_accuracy']:.2f} % on the validation part in epoch {best['epoch']}: "
        line += f"{best['test_accuracy']:.2f} %)"
    if summary["teacher_arch"]:
        line += f", teacher {summary['teacher_arch']} {summary['teacher_accuracy']:.2f} %"
        line += f", they agree on {summary['agreement']:.2f} %"
    line += f", {summary['train_images_per_second']:.0f} images/s"
    if astray := summary.get("diverged"):
        line += f"; it has diverged: {format_divergence(astray)}"
    return line
