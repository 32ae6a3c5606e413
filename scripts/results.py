"""Tables of runs, from their summaries.

python scripts/results.py checkpoints/quickstart/*     print a table of these runs
python scripts/results.py                              write the tables of checkpoints/records/ into the pages
python scripts/results.py --check                      exit code 1 if those in the pages are not what would be written
python scripts/results.py --figure docs/results.svg    draw README's table (pip install matplotlib)
python scripts/results.py --record TABLE RUN...        keep the summaries of finished runs in checkpoints/records/TABLE:
                                                       full, short or methods, as scripts/reproduce.py trains them
"""

import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from cifar10.recipes import RECIPES  # noqa: E402
from distill.config import cli  # noqa: E402
from distill.config.recipe import Recipe, flatten  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.losses import FEATURES, METHODS  # noqa: E402
from distill.losses.kd_loss import KD  # noqa: E402
from distill.options import flag  # noqa: E402

RECORDS = ROOT / "checkpoints" / "records"
MARKERS = ("<!-- {}: written by scripts/results.py -->", "<!-- end -->")
ORIGINAL = {  # accuracies of the original repository in percent: teacher, student; best epoch on the test set
    "resnet152": (92.41, 92.12),
    "densenet40": (92.26, 91.63),
    "resnext29_32x8d": (92.66, 92.20),
}
ORIGINAL_ALONE = 90.67  # its student by cross-entropy
TEACHERS = {"full": tuple(ORIGINAL), "short": ("airbench94", "resnet18", "densenet40")}
TABLES = (*TEACHERS, "methods")
PAGES = {  # the tables of each page
    "README.md": ("results",),
    "cifar10/README.md": (*TEACHERS, "methods"),
    "distill/README.md": ("losses", "features"),
}
LEADING = "short"  # the table of CIFAR-10 that README leads with
# ImageData.content, whatever the order of the images: of CIFAR-10, and with every fifth training image of each class.
CIFAR10 = "afe191a15c2c2067d065351c5259598b7e6061be354b5576d99c406e012dd83d"
SUBSET = "af666bdf02bb302af5dec7f8f1c3bd8ae98bff9236f81eea205590db7a7333b5"
DATA = {"full": CIFAR10, "short": CIFAR10, "methods": SUBSET}
FREE = ("seed", "precision", "teacher_precision", "compile", "sync_bn")  # in which runs of a row may differ


# ------------------------------------------------------------------------------------------------------ what tables are
def rows(table: str) -> dict[str, Recipe]:
    """The recipe of each row of a table, by its name."""
    if table == "methods":
        return by_method(replace(RECIPES["short_student_kd"], teacher_arch="densenet40", epochs=10))
    teacher, student = ("teacher", "long_student") if table == "full" else ("short_teacher", "short_student")
    found = {  # by a recipe of its own, if there is one
        f"teacher-{arch}": RECIPES.get(f"{arch}_teacher", replace(RECIPES[teacher], arch=arch))
        for arch in TEACHERS[table]
    }
    found |= {"student": RECIPES[student], "student-finetuned": RECIPES[f"{student}_finetune"]}
    for arch in TEACHERS[table]:
        found[f"student-kd-{arch}"] = replace(RECIPES[f"{student}_kd"], teacher_arch=arch)
        found[f"student-kd-{arch}-finetuned"] = replace(RECIPES[f"{student}_finetune_kd"], teacher_arch=arch)
    return found


def by_method(taught: Recipe) -> dict[str, Recipe]:
    """Returns the student of `taught` alone and by every method, else alike.

    Their flags are the authors' for CIFAR, but for the warm-up of dkd: theirs takes 20 epochs of 240.
    """
    flags: dict[str, dict[str, Any]] = {
        "kd": {"T": 4.0, "w": 0.9},
        "kd-T1": {"T": 1.0, "kd_weight": 3.0},
        "kd-standardized": {"standardize": True, "kd_weight": 9.0, "ce_weight": 0.1},
        "dkd": {"method": "dkd", "kd_warmup": 2.0},
        **{name: {"features": name} for name in FEATURES},
        "overhaul-kd": {"overhaul": True, "T": 4.0, "w": 0.9},
    }
    flags |= {name: {"method": name} for name in METHODS if name not in (*flags, "none")}
    alone = replace(taught, teacher_arch=None, method=None, features=None)
    plain = replace(taught, method=KD(), features=None)
    return {"ce": alone, **{name: plain.with_flags(given) for name, given in flags.items()}}


def differs(table: str, name: str, recipe: Recipe) -> str | None:
    """What of its recipe keeps a run out of a table, None if it belongs there: `name` is ROW-seedN."""
    found = re.fullmatch(r"(.+)-seed(\d+)", name)
    row = rows(table).get(found[1]) if found else None
    if found is None or row is None:
        return f"{name} is no row of the table {table}, with -seedN behind it"
    if recipe.seed != int(found[2]):
        return f"{name} has --seed {recipe.seed}"
    ours, theirs = flatten(recipe.to_dict()), flatten(row.to_dict())
    if wrong := [key for key in theirs if key not in FREE and ours.get(key) != theirs[key]]:
        return ", ".join(f"{flag(key)} of {name} is {ours.get(key)}, the table's {theirs[key]}" for key in wrong)
    return None


def foreign(table: str, name: str, summary: dict[str, Any], facts: dict[str, Any]) -> str | None:
    """What of its origin keeps a run out of a table: images, starting weights, shares of a batch, and another teacher
    than that of the records there are."""
    if summary.get("data_content") != DATA[table]:
        return f"{name} was trained on other data"
    if bool(facts["init_digest"]) != ("-finetuned-" in name):
        return f"{name} started from {'weights that were given' if facts['init_digest'] else 'random weights'}"
    if facts["world_size"] != 1:
        return f"{name} took its batches in {facts['world_size']} parts, each with BatchNorm statistics of its own"
    others = [load(path) for path in (RECORDS / table).glob("*.json")]
    known = {run.get("teacher_digest") for run in others if run.get("teacher_arch") == summary["teacher_arch"]} - {None}
    if summary["teacher_arch"] and known and facts["teacher_digest"] not in known:
        return f"{name} was taught by another {summary['teacher_arch']} than the runs in {RECORDS / table}"
    return None


# ------------------------------------------------------------------------------------------------------- runs in a list
def row(path: Path) -> tuple[str, ...]:
    """A line of the table, with dashes for a run that is not finished. Raises UserError where there is no run."""
    summary = read(path)
    if summary is None:
        return (path.name, "not finished", "", "-", "-", "-", "-", "-")
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
    known = {summary.get("arch") for summary in found}
    pairs = {(run.get("teacher_arch"), run.get("teacher_accuracy")) for run in found}
    return [
        ("the teacher", arch, "-", "-", "-", f"{accuracy:.2f} %", "-", "-")
        for arch, accuracy in sorted(pairs, key=str)
        if arch and arch not in known and accuracy is not None
    ]


def read(path: Path) -> dict[str, Any] | None:
    """The summary of the run in `path`, None if it is not finished. Raises UserError where there is no run."""
    config = _json(path / "config.json")
    if config is None:
        raise UserError(f"{path} is no directory of a run")
    summary = _json(path / "summary.json")
    if summary and summary.get("epochs") != config.get("recipe", {}).get("epochs"):
        return None  # it was extended
    return summary


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
    say why of those that do not. Whether any was kept. Raises UserError."""
    if table not in TABLES:
        raise UserError(f"--record must be one of {', '.join(TABLES)}, got {table!r}")
    kept = False
    for path in (run.resolve() for run in runs):
        summary = read(path)
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
            last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not what a run leaves ({error!r})") from None
        content = {**summary, **facts, "starts": starts, "last_epoch": last, "recipe": recipe.to_dict()}
        (RECORDS / table).mkdir(parents=True, exist_ok=True)
        (RECORDS / table / f"{path.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        kept = True
    return kept


# ------------------------------------------------------------------------------------------------------ tables in pages
def results(budget: str = LEADING) -> list[str]:
    """Returns the lines of README's table: the student alone, and taught by each teacher that has taught it."""

    def weights(trained_by: str) -> str:
        line = rf"^\| `({arch}-\S+)` \| {re.escape(trained_by)} \| cifar10 \|"
        found = re.search(line, published, flags=re.MULTILINE)
        return f"[{found[1]}](checkpoints/published/{found[1]})" if found else ""

    def hours(runs: Sequence[dict[str, Any]]) -> str:
        return f"{statistics.median(run['wall_seconds'] for run in runs) / 3600:.1f}" if runs else "-"

    published = (ROOT / "checkpoints" / "README.md").read_text()
    alone = seeds(budget, "student")
    arch, epochs = (alone[0]["arch"], alone[0]["epochs"]) if alone else ("the student", "-")
    lines = [
        "| trained by | accuracy | gain over CE | the teacher's accuracy | n | epochs | hours | weights |",
        "|---|---|---|---|---|---|---|---|",
        f"| CE | {mean_and_deviation(alone)} | | | {len(alone)} | {epochs} | {hours(alone)} | {weights('CE')} |",
    ]
    for teacher in TEACHERS[budget]:
        if taught := seeds(budget, f"student-kd-{teacher}"):
            own = f"{taught[0]['teacher_accuracy']:.2f}"
            cells = [mean_and_deviation(taught), difference(taught, alone), own, str(len(taught))]
            cells += [str(taught[0]["epochs"]), hours(taught), weights(f"KD from {teacher}")]
            lines.append(f"| KD from {teacher} | {' | '.join(cells)} |")
    return lines


def accuracies(budget: str) -> list[str]:
    """The lines of the table of CIFAR-10 for one budget: each teacher, and the student alone and taught by it."""

    def finetuned(name: str) -> str:
        runs = seeds(budget, f"{name}-finetuned")
        return f"{mean_and_deviation(runs)}, n = {len(runs)}" if runs else "-"

    alone = seeds(budget, "student")
    lines = [
        "| teacher | accuracy (original's) | student by KD (original's) | gain over CE | gap to the teacher | "
        "finetuned from CE | epochs: teacher, student | seconds: teacher, student | n |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| none: CE | | {mean_and_deviation(alone)} ({ORIGINAL_ALONE}) | | | {finetuned('student')} | "
        f"{only(alone, 'epochs')} | {only(alone, 'wall_seconds')} | {len(alone) or '-'} |",
    ]
    for arch in TEACHERS[budget]:
        teacher, taught = seeds(budget, f"teacher-{arch}"), seeds(budget, f"student-kd-{arch}")
        theirs = [f" ({figure:.2f})" for figure in ORIGINAL[arch]] if arch in ORIGINAL else ["", ""]
        cells = [f"{mean_and_deviation(teacher)}{theirs[0]}", f"{mean_and_deviation(taught)}{theirs[1]}"]
        cells += [difference(taught, alone), difference(teacher, taught)]
        cells += [finetuned(f"student-kd-{arch}")]
        cells += [f"{only(teacher, key)}, {only(taught, key)}" for key in ("epochs", "wall_seconds")]
        lines.append(f"| {arch} | {' | '.join(cells)} | {len(taught) or '-'} |")
    return [*lines, "", made(seeds(budget, name) for name in rows(budget))]


def methods() -> list[str]:
    """The lines of the table of methods: a student alone, and taught by each of them; the best first."""
    found = {name: seeds("methods", name) for name in rows("methods")}
    lines = [
        "| run | trained by | with | test accuracy | gain over CE | agreement with the teacher | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(found.items(), key=lambda row: mean(row[1]) if row[1] else 0.0, reverse=True):
        if not runs:
            lines.append(f"| `{name}` |  |  | - | - | - | - |")
            continue
        used = re.search(r"  with (.*?)(;|$)", runs[0]["formula"] or "")
        gain = "" if name == "ce" else difference(runs, found["ce"])
        agreement = "" if name == "ce" else only(runs, "agreement", 2)
        cells = [
            runs[0]["trained_by"],
            used[1] if used else "",
            mean_and_deviation(runs),
            gain,
            agreement,
            str(len(runs)),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return [*lines, "", made(found.values())]


def draw(path: Path, budget: str = LEADING) -> None:
    """Writes README's table as a figure: the student alone, taught, and the teacher. Raises UserError."""
    from distill.report import figures

    figures.check_matplotlib()
    points: dict[str, list[tuple[str, float, float]]] = {"student, CE": [], "student, KD": [], "teacher": []}
    alone = seeds(budget, "student")
    for teacher in TEACHERS[budget]:
        if taught := seeds(budget, f"student-kd-{teacher}"):
            for name, runs in (("student, CE", alone), ("student, KD", taught)):
                points[name] += [(teacher, mean(runs), deviation(runs))] if runs else []
            points["teacher"].append((teacher, taught[0]["teacher_accuracy"], 0.0))
    lines = {figures.Line(name, place): of_line for place, (name, of_line) in enumerate(points.items())}
    figures.write_svg(figures.gains(lines, "EfficientNet-B0 on CIFAR-10, alone and taught"), path)


def losses() -> list[str]:
    """Returns the lines of the table of methods on logits."""
    lines = ["| method | its term of the loss | flags (on photos) | source |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        if method.formula:
            term = method.formula.replace("|", "\\|") + (f"; {method.note}" if method.note else "")
            lines.append(f"| {linked(name, method)} | {term} | {method.flags()} | {method.source} |")
    return lines


def features() -> list[str]:
    """Returns the lines of the table of methods on features."""
    lines = ["| features | their term of the loss | learned beside the student | flags (on photos) | source |"]
    lines.append("|---|---|---|---|---|")
    for name, method in FEATURES.items():
        cells = [linked(name, method), method.formula.replace("|", "\\|"), method.learns or "nothing"]
        lines.append(f"| {' | '.join([*cells, method.flags(), method.source])} |")
    return lines


def linked(name: str, method: type) -> str:
    """Returns the name of a method as a link from the page of distill to its file."""
    return f"[`{name}`]({'/'.join(method.__module__.split('.')[1:])}.py)"


def made(rows_of_runs: Iterable[Sequence[dict[str, Any]]]) -> str:
    """What the runs of a table were made on, and by which commits."""
    runs = [run for row_of_runs in rows_of_runs for run in row_of_runs]
    devices = sorted({run["device"] for run in runs})
    commits = sorted({re.sub(r"(?<=^\w{7})\w*", "", str(run["commit"])) for run in runs})
    return f"Measured on: {'; '.join(devices)}; commits {', '.join(commits)}." if runs else "Measured on: nothing yet."


def seeds(budget: str, name: str) -> list[dict[str, Any]]:
    """The records of a row, one for each seed."""
    paths = (RECORDS / budget).glob(f"{name}-seed*.json")
    return [load(path) for path in sorted(paths) if re.fullmatch(rf"{name}-seed\d+", path.stem)]


def load(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        for key in ("test_accuracy", "epochs", "wall_seconds", "device", "commit"):
            found[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a run ({error!r})") from None
    return found


def mean(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(run["test_accuracy"] for run in runs)


def deviation(runs: Sequence[dict[str, Any]]) -> float:
    """The standard deviation of one run, 0 where there are no two."""
    return statistics.stdev(run["test_accuracy"] for run in runs) if len(runs) > 1 else 0.0


def mean_and_deviation(runs: Sequence[dict[str, Any]]) -> str:
    """`92.12`, of several `92.12 +- 0.10` (the deviation of one), of none `-`."""
    if not runs:
        return "-"
    spread = f" +- {deviation(runs):.2f}" if len(runs) > 1 else ""
    return f"{mean(runs):.2f}{spread}"


def difference(high: Sequence[dict[str, Any]], low: Sequence[dict[str, Any]]) -> str:
    return f"{mean(high) - mean(low):+.2f}" if high and low else "-"


def only(runs: Sequence[dict[str, Any]], key: str, places: int = 0) -> str:
    """The median of a figure."""
    return f"{statistics.median(run[key] for run in runs):.{places}f}" if runs else "-"


def tables() -> dict[str, list[str]]:
    """Returns the lines of every table, as the records have them."""
    command = "`bash scripts/reproduce.sh {}`:"
    found = {budget: [command.format(f"cifar10 --budget {budget}"), "", *accuracies(budget)] for budget in TEACHERS}
    found["methods"] = [command.format("methods --data SUBSET"), "", *methods()]
    return found | {"results": results(), "losses": losses(), "features": features()}


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
    found, stale = tables(), {}
    for page in PAGES:
        text = (ROOT / page).read_text()
        new = written(page, text, found)
        if new != text:
            stale[page] = new
    for page, new in stale.items():
        if check:
            print(f"{page}'s tables are not those of checkpoints/records/: python scripts/results.py writes them")
        else:
            (ROOT / page).write_text(new)
    return bool(stale)


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
        draw(Path(argv[1]))
    elif not argv or argv == ["--check"]:
        check = bool(argv)
        return 1 if write_pages(check) and check else 0
    else:
        paths = [Path(run) for run in argv]
        head = ("run", "network", "trained by", "parameters", "epochs", "test accuracy", "agreement", "seconds")
        show([head, *given_teachers(paths), *map(row, paths)])
    return 0


def show(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(line[k]) for line in rows) for k in range(len(rows[0]))]
    for line in rows:
        left = [line[k].ljust(widths[k]) for k in (0, 1)]
        print("  ".join(left + [line[k].rjust(widths[k]) for k in range(2, len(line))]))


if __name__ == "__main__":
    cli.run(main)
