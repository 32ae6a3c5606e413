"""Print a table of finished runs, from their summaries.

python scripts/results.py checkpoints/quickstart/*
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill import cli  # noqa: E402
from distill.recipe import UserError  # noqa: E402


def row(path: Path) -> tuple[str, ...]:
    """A line of the table, with dashes for a run that is not finished. Raises UserError where there is no run."""
    try:
        text = (path / "summary.json").read_text()
    except FileNotFoundError:
        if not (path / "config.json").exists():
            raise UserError(f"{path} is no directory of a run") from None
        return (path.name, "not finished", "-", "-", "-", "-")
    try:
        summary: dict[str, Any] = json.loads(text)
        taught = f"KD from {summary['teacher_arch']}" if summary["teacher_arch"] else "CE"
        trained_by = summary.get("trained_by") or taught  # of a run before there were other methods
        numbers = (f"{summary['parameters']:,}", f"{summary['epochs']}", f"{summary['test_accuracy']:.2f} %")
        return (summary["arch"], trained_by, *numbers, f"{summary['wall_seconds']:.0f}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'summary.json'} is no summary of a run ({error!r})") from None


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    rows = [("network", "trained by", "parameters", "epochs", "test accuracy", "seconds"), *map(row, map(Path, argv))]
    widths = [max(len(line[k]) for line in rows) for k in range(len(rows[0]))]
    for line in rows:
        left = [line[k].ljust(widths[k]) for k in (0, 1)]
        print("  ".join(left + [line[k].rjust(widths[k]) for k in range(2, len(line))]))


if __name__ == "__main__":
    cli.run(main)
