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


def row(summary: dict[str, Any]) -> tuple[str, ...]:
    teacher = f"KD from {summary['teacher_arch']}" if summary["teacher_arch"] else "CE"
    accuracy = f"{summary['test_accuracy']:.2f} %"
    return summary["arch"], teacher, f"{summary['parameters']:,}", accuracy, f"{summary['wall_seconds']:.0f}"


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    rows: list[tuple[str, ...]] = [("network", "trained by", "parameters", "test accuracy", "seconds")]
    for name in argv:
        path = Path(name) / "summary.json"
        try:
            rows.append(row(json.loads(path.read_text())))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no summary of a finished run ({error})") from None
    widths = [max(len(line[k]) for line in rows) for k in range(len(rows[0]))]
    for line in rows:
        left = [line[k].ljust(widths[k]) for k in (0, 1)]
        print("  ".join(left + [line[k].rjust(widths[k]) for k in range(2, len(line))]))


if __name__ == "__main__":
    cli.run(main)
