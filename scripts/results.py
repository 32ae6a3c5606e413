"""Tables of runs, from their summaries.

python scripts/results.py checkpoints/quickstart/*     print a table of these runs
python scripts/results.py                              write the tables of checkpoints/records/ into the pages
python scripts/results.py --check                      exit code 1 if those in the pages are not what would be written
python scripts/results.py --figure docs/results.svg    draw README's table (pip install matplotlib)
python scripts/results.py --record TABLE RUN...        keep the summaries of finished runs in checkpoints/records/TABLE:
                                                       full, cpu, methods or tuning, as reproduce.sh trains
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from distill.config import cli  # noqa: E402
from distill.config.recipe import Recipe, flatten  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import flag  # noqa: E402
from scripts import tables  # noqa: E402

SAME = 0.3  # points by which the accuracy of a teacher, as it teaches, may differ from that of its run
PAGES = {  # the tables of each page
    "README.md": ("results",),
    "cifar10/README.md": (*tables.BUDGETS, "methods", "tuning"),
    "distill/README.md": ("losses", "features"),
}
MARKERS = ("<!-- {}: written by scripts/results.py -->", "<!-- end -->")


# ------------------------------------------------------------------------------------------------------------- records
def differs(table: str, name: str, recipe: Recipe) -> str | None:
    """What of its recipe keeps a run out of a table, None if it belongs there: `name` is ROW-seedN."""
    found = re.fullmatch(r"(.+)-seed(\d+)", name)
    row = tables.rows(table).get(found[1]) if found else None
    if found is None or row is None:
        return f"{name} is no row of the table {table}, with -seedN behind it"
    if recipe.seed != int(found[2]):
        return f"{name} has --seed {recipe.seed}"
    ours, theirs = flatten(recipe.to_dict()), flatten(row.to_dict())
    if wrong := [key for key in theirs if key not in tables.FREE and ours.get(key) != theirs[key]]:
        return ", ".join(f"{flag(key)} of {name} is {ours.get(key)}, the table's {theirs[key]}" for key in wrong)
    return None


def foreign(table: str, name: str, summary: dict[str, Any], facts: dict[str, Any]) -> str | None:
    """What of its origin keeps a run out of a table: images, starting weights, shares of a batch, and another teacher
    than that of the records there are."""
    if summary.get("data_content") != tables.DATA[table]:
        return f"{name} was trained on other data"
    row = tables.rows(table)[name.rpartition("-seed")[0]]
    if bool(facts["init_digest"]) != (row.pretrained or "-finetuned-" in name):
        return f"{name} started from {'weights that were given' if facts['init_digest'] else 'random weights'}"
    if facts["world_size"] != 1:
        return f"{name} took its batches in {facts['world_size']} parts, each with BatchNorm statistics of its own"
    others = [tables.load(path) for path in (tables.RECORDS / table).glob("*.json")]
    known = {run.get("teacher_digest") for run in others if run.get("teacher_arch") == summary["teacher_arch"]} - {None}
    if summary["teacher_arch"] and known and facts["teacher_digest"] not in known:
        return f"{name} was taught by another {summary['teacher_arch']} than the runs in {tables.RECORDS / table}"
    return None


# ------------------------------------------------------------------------------------------------------- runs in a list
def row(path: Path) -> tuple[str, ...]:
    """A line of the table, with dashes for a run that is not finished. Raises UserError where there is no run."""
    summary = read(path)
    if summary is None:
        astray = diverged(path)
        state = f"diverged at step {astray['diverged']['step']}" if astray else "not finished"
        return (path.name, state, "", "-", "-", "-", "-", "-")
    try:
        taught = f"KD from {summary['teacher_arch']}" if summary["teacher_arch"] else "CE"
        trained_by = summary.get("trained_by") or taught  # of a run before there were other methods
        numbers = (f"{summary['parameters']:,}", f"{summary['epochs']}", f"{summary['test_accuracy']:.2f} %")
        agreement = "-" if summary["agreement"] is None else f"{summary['agreement']:.2f} %"
        return (path.name, summary["arch"], trained_by, *numbers, agreement, f"{summary['wall_seconds']:.0f}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'summary.json'} is no summary of a run ({error!r})") from None


def given_teachers(paths: Sequence[Path]) -> list[tuple[str, ...]]:
    """A line for each teacher that is not among the runs itself, with its accuracy on their test images."""
    found = [summary for summary in map(read, paths) if summary]
    known = [(run.get("arch"), run.get("test_accuracy") or 0.0) for run in found]
    pairs = {(run.get("teacher_arch"), run.get("teacher_accuracy")) for run in found}
    return [
        ("the teacher", arch, "-", "-", "-", f"{accuracy:.2f} %", "-", "-")
        for arch, accuracy in sorted(pairs, key=str)
        if arch and accuracy is not None
        if not any(arch == own and abs(accuracy - measured) < SAME for own, measured in known)
    ]


def teachers_that_differ(paths: Sequence[Path]) -> list[str]:
    """Returns the networks of which there are several teachers, with other weights, among those of finished runs."""
    weights: dict[str, set[str]] = {}
    for path in paths:
        if (summary := read(path)) and summary.get("teacher_arch"):
            facts = (_json(path / "config.json") or {}).get("facts", {})
            weights.setdefault(summary["teacher_arch"], set()).add(facts.get("teacher_digest"))
    return [arch for arch, digests in weights.items() if len(digests) > 1]


def read(path: Path) -> dict[str, Any] | None:
    """The summary of the run in `path`, None if it is not finished. Raises UserError where there is no run."""
    config = _json(path / "config.json")
    if config is None:
        raise UserError(f"{path} is no directory of a run")
    summary = _json(path / "summary.json")
    if summary and summary.get("epochs") != config.get("recipe", {}).get("epochs"):
        return None  # it was extended
    return summary


def diverged(path: Path) -> dict[str, Any] | None:
    """What is known of the run in `path` if its loss was not finite, else None."""
    return _json(path / "diverged.json")


def _json(path: Path) -> dict[str, Any] | None:
    """What is in the file, None if there is none. Raises UserError."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what a run leaves")
    return found


def record(table: str, runs: Sequence[Path]) -> bool:
    """Keep what a reviewer asks of the finished runs that belong to a table in checkpoints/records/TABLE/RUN.json, and
    say why of those that do not. That a run has diverged is a result too, where methods or weights are compared.
    Whether any was kept. Raises UserError."""
    if table not in tables.DATA:
        raise UserError(f"--record must be one of {', '.join(tables.DATA)}, got {table!r}")
    kept = False
    for path in (run.resolve() for run in runs):
        finished = read(path)
        summary = finished or (None if table in tables.BUDGETS else diverged(path))  # accuracies are of finished runs
        if summary is None:
            print(f"{path} is not finished: not recorded")
            continue
        config = _json(path / "config.json") or {}
        try:
            recipe = Recipe.from_dict(config["recipe"])
            if why := differs(table, path.name, recipe) or foreign(table, path.name, summary, config["facts"]):
                print(f"not recorded: {why}")
                continue
            facts = {key: value for key, value in config["facts"].items() if key.endswith("digest")}
            starts = [{"time": start["time"], "commit": start["commit"]} for start in config["starts"]]
            last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) if finished else None
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not what a run leaves ({error!r})") from None
        content = {**summary, **facts, "starts": starts, "last_epoch": last, "recipe": recipe.to_dict()}
        (tables.RECORDS / table).mkdir(parents=True, exist_ok=True)
        _write(tables.RECORDS / table / f"{path.name}.json", json.dumps(content, indent=1) + "\n")
        kept = True
    return kept


# ------------------------------------------------------------------------------------------------------ tables in pages
def written(page: str, text: str, found: dict[str, list[str]]) -> str:
    """Returns the text of a page with its tables as they are `found`. Raises UserError if it has no place for them."""
    for name in PAGES[page]:
        begin = MARKERS[0].format(name)
        head, _, rest = text.partition(begin)
        old, end, tail = rest.partition(MARKERS[1])
        if text.count(begin) != 1 or not end or "written by" in old:
            raise UserError(f"{page} must have one line {begin}, and after it one {MARKERS[1]}")
        text = "\n".join([head + begin, "", *found[name], "", MARKERS[1] + tail])
    return text


def write_pages(check: bool) -> bool:
    """Writes the tables into the pages, all or none; returns whether they were stale. With `check` writes nothing."""
    found, stale = tables.lines(), {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        new = written(page, text, found)
        if new != text:
            stale[page] = new
    for page, new in stale.items():
        if check:
            print(f"{page}'s tables are not those of checkpoints/records/: python scripts/results.py writes them")
        else:
            _write(ROOT / page, new)
            print(f"{page}: its tables were written anew")
    return bool(stale)


def _write(path: Path, text: str) -> None:
    """Writes a file that another job may read meanwhile."""
    from distill.files.checkpoint import write_atomically  # loads torch

    write_atomically(path, text.encode())


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif argv and argv[0] == "--record":
        if len(argv) < 3:
            raise UserError("--record TABLE RUN...: a table and a run at least")
        record(argv[1], [Path(run) for run in argv[2:]])
    elif argv and argv[0] == "--figure":
        if len(argv) != 2:
            raise UserError("--figure FILE: where the figure goes")
        tables.draw(Path(argv[1]))
    elif not argv or argv == ["--check"]:
        check = bool(argv)
        return 1 if write_pages(check) and check else 0
    else:
        paths = [Path(run) for run in argv]
        empty = [path for path in paths if path.is_dir() and {file.name for file in path.iterdir()} <= {"lock"}]
        if empty:  # a start that was refused
            print(f"note: left out, since nothing was saved in them: {', '.join(map(str, empty))}", file=sys.stderr)
        paths = [path for path in paths if path not in empty]
        head = ("run", "network", "trained by", "parameters", "epochs", "test accuracy", "agreement", "seconds")
        show([head, *given_teachers(paths), *map(row, paths)])
        for arch in teachers_that_differ(paths):
            print(f"note: these students were not all taught by the same {arch}")
    return 0


def show(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(line[k]) for line in rows) for k in range(len(rows[0]))]
    for line in rows:
        left = [line[k].ljust(widths[k]) for k in (0, 1)]
        print("  ".join(left + [line[k].rjust(widths[k]) for k in range(2, len(line))]))


if __name__ == "__main__":
    cli.run(main)
