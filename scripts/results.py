"""Tables of runs, from their summaries.

python scripts/results.py checkpoints/quickstart/*     print a table of these runs
python scripts/results.py                              write the tables of checkpoints/records/ into README.md
python scripts/results.py --check                      exit code 1 if those in README.md are not what would be written
python scripts/results.py --record BUDGET RUN...       keep the summaries of finished runs in checkpoints/records/
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from distill import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402

RECORDS = ROOT / "checkpoints" / "records"
MARKERS = ("<!-- written by scripts/results.py -->", "<!-- end -->")
ORIGINAL = {  # accuracies of the original repository in percent: teacher, student; best epoch on the test set
    "resnet152": (92.41, 92.12),
    "densenet40": (92.26, 91.63),
    "resnext29_32x8d": (92.66, 92.20),
}
ORIGINAL_ALONE = 90.67  # its student by cross-entropy
TABLES = {"full": tuple(ORIGINAL), "short": ("resnet18",)}  # teachers; what reproduce.sh trains


# ------------------------------------------------------------------------------------------------------- runs in a list
def row(path: Path) -> tuple[str, ...]:
    """A line of the table, with dashes for a run that is not finished. Raises UserError where there is no run."""
    summary = read(path)
    if summary is None:
        return (path.name, "not finished", "-", "-", "-", "-")
    try:
        taught = f"KD from {summary['teacher_arch']}" if summary["teacher_arch"] else "CE"
        trained_by = summary.get("trained_by") or taught  # of a run before there were other methods
        numbers = (f"{summary['parameters']:,}", f"{summary['epochs']}", f"{summary['test_accuracy']:.2f} %")
        return (summary["arch"], trained_by, *numbers, f"{summary['wall_seconds']:.0f}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'summary.json'} is no summary of a run ({error!r})") from None


def read(path: Path) -> dict[str, Any] | None:
    """The summary of the run in `path`, None if it is not finished. Raises UserError where there is no run."""
    try:
        found = json.loads((path / "summary.json").read_text())
    except FileNotFoundError:
        if not (path / "config.json").exists():
            raise UserError(f"{path} is no directory of a run") from None
        return None
    except ValueError as error:
        raise UserError(f"{path / 'summary.json'} is no summary of a run ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path / 'summary.json'} is no summary of a run")
    return found


def record(budget: str, runs: Sequence[Path]) -> None:
    """Keep summary and recipe of each finished run as checkpoints/records/BUDGET/RUN.json. Raises UserError."""
    if budget not in TABLES:
        raise UserError(f"--record must be one of {', '.join(TABLES)}, got {budget!r}")
    for path in runs:
        summary = read(path)
        if summary is None:
            print(f"{path} is not finished: not recorded")
            continue
        recipe = json.loads((path / "config.json").read_text())["recipe"]
        (RECORDS / budget).mkdir(parents=True, exist_ok=True)
        text = json.dumps({**summary, "recipe": recipe}, indent=1) + "\n"
        (RECORDS / budget / f"{path.name}.json").write_text(text)


# ----------------------------------------------------------------------------------------------------- tables in README
def table(budget: str) -> list[str]:
    """The lines of the table of CIFAR-10 for one budget: each teacher, and the student alone and taught by it."""
    alone = seeds(budget, "student")
    lines = [
        "| teacher | accuracy (original's) | student by KD (original's) | gain over CE | gap to the teacher | "
        "finetuned from CE | epochs: teacher, student | seconds: teacher, student | n |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| none: CE | | {told(alone)} ({ORIGINAL_ALONE}) | | | | {only(alone, 'epochs')} | "
        f"{only(alone, 'wall_seconds')} | {len(alone) or '-'} |",
    ]
    for arch in TABLES[budget]:
        teacher, taught = seeds(budget, f"teacher-{arch}"), seeds(budget, f"student-kd-{arch}")
        theirs = [f" ({figure:.2f})" for figure in ORIGINAL[arch]] if arch in ORIGINAL else ["", ""]
        cells = [f"{told(teacher)}{theirs[0]}", f"{told(taught)}{theirs[1]}"]
        cells += [difference(taught, alone), difference(teacher, taught)]
        cells += [told(seeds(budget, f"student-kd-{arch}-finetuned"))]
        cells += [f"{only(teacher, key)}, {only(taught, key)}" for key in ("epochs", "wall_seconds")]
        lines.append(f"| {arch} | {' | '.join(cells)} | {len(taught) or '-'} |")
    devices = sorted({run["device"] for path in (RECORDS / budget).glob("*.json") for run in [load(path)]})
    return [*lines, "", f"Measured on: {'; '.join(devices) or 'nothing yet'}."]


def seeds(budget: str, name: str) -> list[dict[str, Any]]:
    """The records of a row, one for each seed."""
    paths = (RECORDS / budget).glob(f"{name}-seed*.json")
    return [load(path) for path in sorted(paths) if re.fullmatch(rf"{name}-seed\d+", path.stem)]


def load(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        float(found["test_accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a run ({error!r})") from None
    return found


def mean(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(run["test_accuracy"] for run in runs)


def told(runs: Sequence[dict[str, Any]]) -> str:
    """`92.12`, of several `92.12 +- 0.10` (the deviation of one), of none `-`."""
    if not runs:
        return "-"
    spread = f" +- {statistics.stdev(run['test_accuracy'] for run in runs):.2f}" if len(runs) > 1 else ""
    return f"{mean(runs):.2f}{spread}"


def difference(high: Sequence[dict[str, Any]], low: Sequence[dict[str, Any]]) -> str:
    return f"{mean(high) - mean(low):+.2f}" if high and low else "-"


def only(runs: Sequence[dict[str, Any]], key: str) -> str:
    """The median of a figure, a whole number."""
    return f"{statistics.median(run[key] for run in runs):.0f}" if runs else "-"


def written(text: str) -> str:
    """README's `text` with the tables as the records have them. Raises UserError if it has no place for them."""
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise UserError(f"README.md must have one line {MARKERS[0]} and one {MARKERS[1]}")
    head, _, rest = text.partition(MARKERS[0])
    _, _, tail = rest.partition(MARKERS[1])
    tables = [
        ["", f"`bash scripts/reproduce.sh cifar10 --budget {budget}`:", "", *table(budget), ""] for budget in TABLES
    ]
    return head + MARKERS[0] + "\n" + "\n".join(line for lines in tables for line in lines) + "\n" + MARKERS[1] + tail


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif argv and argv[0] == "--record":
        if len(argv) < 3:
            raise UserError("--record BUDGET RUN...: a budget and a run at least")
        record(argv[1], [Path(run) for run in argv[2:]])
    elif not argv or argv == ["--check"]:
        path = ROOT / "README.md"
        text = path.read_text()
        new = written(text)
        if argv and new != text:
            print(
                "README.md has tables that are not those of checkpoints/records/: python scripts/results.py writes them"
            )
            return 1
        if new != text:
            path.write_text(new)
    else:
        show(
            [("network", "trained by", "parameters", "epochs", "test accuracy", "seconds"), *map(row, map(Path, argv))]
        )
    return 0


def show(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(line[k]) for line in rows) for k in range(len(rows[0]))]
    for line in rows:
        left = [line[k].ljust(widths[k]) for k in (0, 1)]
        print("  ".join(left + [line[k].rjust(widths[k]) for k in range(2, len(line))]))


if __name__ == "__main__":
    cli.run(main)
