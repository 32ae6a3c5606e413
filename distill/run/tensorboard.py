"""TensorBoard's files of a run: a value an epoch for each entry of its records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.errors import UserError


class TensorBoardWriter:
    """The event files in a directory. Raises UserError if the package tensorboard is absent."""

    def __init__(self, path: Path) -> None:
        try:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self._open: Callable[[], Any] = lambda: SummaryWriter(str(path))
        self._writer: Any = None  # until there is something to write: it makes a file at once
        self._shown: dict[str, set[int]] = {}
        if path.exists():
            events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()  # 0: all of them
            self._shown = {tag: {event.step for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    def show(self, records: list[dict[str, Any]]) -> None:
        """Writes what the files lack of `records`: all that was recorded without them, or before a kill."""
        for record in records:
            for name, value in record.items():
                steps = self._shown.setdefault(name, set())
                if value is not None and record["epoch"] not in steps:
                    self._writer = self._writer or self._open()
                    self._writer.add_scalar(name, value, record["epoch"])
                    steps.add(record["epoch"])
        if self._writer:
            self._writer.flush()
