"""What the tables of results are: their rows, and their lines as the records have them. results.py writes them."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cifar10.recipes import RECIPES
from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.losses import FEATURES, METHODS
from distill.losses.kd_loss import KD

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "checkpoints" / "records"
ORIGINAL = {  # accuracies of the original repository in percent: teacher, student; best epoch on the test set
    "resnet152": (92.41, 92.12),
    "densenet40": (92.26, 91.63),
    "resnext29_32x8d": (92.66, 92.20),
}
ORIGINAL_ALONE = 90.67  # its student by cross-entropy


@dataclass(frozen=True)
class Budget:
    """What a machine trains of CIFAR-10.

    student: its recipes, by CE NAME, taught NAME_kd, NAME_finetune, NAME_finetune_kd. teachers: their recipes by
    architecture. longer: in what a second student differs, which is trained alone and by the first of the teachers.
    """

    student: str
    teachers: dict[str, Recipe]
    longer: dict[str, Any] = field(default_factory=dict)


_ON_CPU = RECIPES["short_teacher"]
BUDGETS = {
    "full": Budget("long_student", {arch: replace(RECIPES["teacher"], arch=arch) for arch in ORIGINAL}),
    "cpu": Budget(
        "cpu_student",
        {
            "airbench94": RECIPES["airbench94_teacher"],
            "efficientnet-lite0": RECIPES["pretrained_teacher"],
            "densenet40": replace(_ON_CPU, arch="densenet40", epochs=40),
            "resnet152": replace(_ON_CPU, arch="resnet152"),
            "resnext29_32x8d": replace(_ON_CPU, arch="resnext29_32x8d"),
        },
        longer={"epochs": 150, "sizes": "24:90"},
    ),
}
LEADING = "cpu"  # the budget that README leads with
# ImageData.content, whatever the order of the images: of CIFAR-10, and with every fifth training image of each class.
CIFAR10 = "afe191a15c2c2067d065351c5259598b7e6061be354b5576d99c406e012dd83d"
SUBSET = "af666bdf02bb302af5dec7f8f1c3bd8ae98bff9236f81eea205590db7a7333b5"
DATA = {**dict.fromkeys(BUDGETS, CIFAR10), "methods": SUBSET, "tuning": SUBSET}
HELD_OUT = 1000  # training images that the weights of methods are chosen on
FACTORS = (0.1, 1.0, 10.0)  # of the weight in the table of methods: what is tried
FREE = ("seed", "precision", "teacher_precision", "compile", "sync_bn")  # in which runs of a row may differ


# ---------------------------------------------------------------------------------------------------------------- rows
def rows(table: str) -> dict[str, Recipe]:
    """The recipe of each row of a table, by its name."""
    taught = replace(RECIPES["short_student_kd"], teacher_arch="densenet40", epochs=10)
    if table == "methods":
        chosen = {name: best_factor(name) for name in at_factor(taught, 1.0)}
        better = {
            f"{name}-x{factor:g}": at_factor(taught, factor)[name] for name, factor in chosen.items() if factor != 1
        }
        return by_method(taught) | better
    if table == "tuning":
        found = {
            f"{name}-x{factor:g}": recipe for factor in FACTORS for name, recipe in at_factor(taught, factor).items()
        }
        return {name: replace(found[name], val_split=HELD_OUT) for name in sorted(found)}
    budget = BUDGETS[table]
    student = budget.student
    found = {f"teacher-{arch}": recipe for arch, recipe in budget.teachers.items()}
    found |= {"student": RECIPES[student], "student-finetuned": RECIPES[f"{student}_finetune"]}
    for arch in budget.teachers:
        found[f"student-kd-{arch}"] = replace(RECIPES[f"{student}_kd"], teacher_arch=arch)
        found[f"student-kd-{arch}-finetuned"] = replace(RECIPES[f"{student}_finetune_kd"], teacher_arch=arch)
    for name, taught_by in students(table).items():
        if name not in found:
            found[name] = replace(found["student"], **budget.longer)
            found |= {row: replace(found[f"student-kd-{arch}"], **budget.longer) for arch, row in taught_by.items()}
    return found


def students(budget: str) -> dict[str, dict[str, str]]:
    """Returns by the row of each student alone those of the same student taught, by their teachers' architectures.

    The student that trains longer is student-150 alone, taught student-150-kd-airbench94.
    """
    teachers, longer = BUDGETS[budget].teachers, BUDGETS[budget].longer
    found = {"student": {arch: f"student-kd-{arch}" for arch in teachers}}
    if longer:
        name, first = f"student-{longer['epochs']}", next(iter(teachers))
        found[name] = {first: f"{name}-kd-{first}"}
    return found


def by_method(taught: Recipe) -> dict[str, Recipe]:
    """Returns the student of `taught` alone and by every method, else alike.

    Their flags are the authors' for CIFAR, but for the warm-up of dkd and reviewkd, which takes 20 of their 240 epochs,
    and for kd, kd-T1 and overhaul-kd, whose T and weights are ours.
    """
    flags: dict[str, dict[str, Any]] = {
        "kd": {"T": 4.0, "w": 0.9},
        "kd-T1": {"T": 1.0, "kd_weight": 3.0},
        "kd-standardized": {"standardize": True, "kd_weight": 9.0, "ce_weight": 0.1},
        "dkd": {"method": "dkd", "kd_warmup": 2.0},
        **{name: {"features": name} for name in FEATURES},
        "reviewkd": {"features": "reviewkd", "feature_warmup": 2.0},
        "overhaul-kd": {"overhaul": True, "T": 4.0, "w": 0.9},
    }
    flags |= {name: {"method": name} for name in METHODS if name not in (*flags, "none")}
    alone = replace(taught, teacher_arch=None, method=None, features=None)
    plain = replace(taught, method=KD(), features=None)
    return {"ce": alone, **{name: plain.with_flags(given) for name, given in flags.items()}}


def at_factor(taught: Recipe, factor: float) -> dict[str, Recipe]:
    """Returns the student by each method whose weight is chosen, at `factor` times the weight that `by_method` has."""
    found = {}
    for name, recipe in by_method(taught).items():
        method = recipe.method
        if recipe.features and name in FEATURES:
            found[name] = recipe.with_flags({"feature_weight": factor * recipe.features.feature_weight})
        elif name == "kd":  # w and 1 - w, one by one
            found[name] = replace(taught, method=KD(T=4.0, w=None, kd_weight=factor * 0.9, ce_weight=0.1))
        elif name in METHODS and method is not None:
            found[name] = recipe.with_flags({"kd_weight": factor * method.numbers["kd_weight"]})
    return found


def best_factor(name: str) -> float:
    """Returns the factor that is best on held-out images; 1 where it is as good, or not all have the same seeds."""
    tried = {factor: runs_of("tuning", f"{name}-x{factor:g}") for factor in FACTORS}
    if not all(tried.values()) or len({len(runs) for runs in tried.values()}) > 1:
        return 1.0
    return max(FACTORS, key=lambda factor: (held_out(tried[factor]), factor == 1))


# --------------------------------------------------------------------------------------------------------------- lines
def lines() -> dict[str, list[str]]:
    """Returns the lines of every table, as the records have them."""
    command = "`bash scripts/reproduce.sh {}`:"
    found = {budget: [command.format(f"cifar10 --budget {budget}"), "", *accuracies(budget)] for budget in BUDGETS}
    found["methods"] = [command.format("methods --data SUBSET"), "", *methods()]
    found["tuning"] = [command.format("tuning --data SUBSET"), "", *tuning()]
    return found | {"results": results(), "losses": losses(), "features": features()}


def results(budget: str = LEADING) -> list[str]:
    """Returns the lines of README's table: the student alone, and taught by each teacher that has taught it."""

    def weights(trained_by: str) -> str:
        line = rf"^\| `({arch}-\S+)` \| {re.escape(trained_by)} \| cifar10 \| [\d.]+ % \| {epochs} \|"
        found = re.search(line, published, flags=re.MULTILINE)
        return f"[{found[1]}](checkpoints/published/{found[1]})" if found else ""

    def hours(runs: Sequence[dict[str, Any]]) -> str:
        return f"{statistics.median(run['wall_seconds'] for run in runs) / 3600:.1f}" if runs else "-"

    published = (ROOT / "checkpoints" / "README.md").read_text()
    head = ["trained by", "accuracy", "gain over CE", "the teacher's accuracy", "n", "epochs", "hours", "weights"]
    found = []
    for name, taught_by in students(budget).items():
        alone = runs_of(budget, name)
        arch, epochs = (alone[0]["arch"], alone[0]["epochs"]) if alone else ("the student", "-")
        if alone or name == "student":
            cells = ["CE", mean_and_deviation(alone), "", "", f"{len(alone)}", f"{epochs}", hours(alone), weights("CE")]
            found.append(cells)
        for teacher, row in taught_by.items():
            if taught := runs_of(budget, row):
                epochs, own = taught[0]["epochs"], f"{taught[0]['teacher_accuracy']:.2f}"
                cells = [mean_and_deviation(taught), difference(taught, alone), own, f"{len(taught)}"]
                cells += [f"{epochs}", hours(taught), weights(f"KD from {teacher}")]
                found.append([f"KD from {teacher}", *cells])
    if not any(cells[-1] for cells in found):  # no weights of these runs are published
        head, found = head[:-1], [cells[:-1] for cells in found]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *found)]


def accuracies(budget: str) -> list[str]:
    """The lines of the table of CIFAR-10 for one budget: each teacher, and the student alone and taught by it."""

    def finetuned(name: str) -> str:
        runs = runs_of(budget, f"{name}-finetuned")
        return f"{mean_and_deviation(runs)}, n = {len(runs)}" if runs else "-"

    def epochs(name: str, runs: Sequence[dict[str, Any]]) -> str:
        return median_of(runs, "epochs") if runs else f"{recipes[name].epochs}"

    recipes = rows(budget)
    lines = [
        "| teacher | accuracy (original's) | student by KD (original's) | gain over CE | gap to the teacher | "
        "finetuned from CE | epochs: teacher, student | seconds: teacher, student | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, taught_by in students(budget).items():
        alone = runs_of(budget, name)
        longer = "" if name == "student" else f"; student of {name.removeprefix('student-')} epochs"
        original = f" ({ORIGINAL_ALONE})" if name == "student" else ""
        cells = [f"{mean_and_deviation(alone)}{original}", "", "", finetuned(name), epochs(name, alone)]
        lines.append(
            f"| none: CE{longer} | | {' | '.join(cells)} | {median_of(alone, 'wall_seconds')} | {len(alone) or '-'} |"
        )
        for arch, row in taught_by.items():
            teacher, taught = runs_of(budget, f"teacher-{arch}"), runs_of(budget, row)
            theirs = [f" ({figure:.2f})" for figure in ORIGINAL[arch]] if arch in ORIGINAL else ["", ""]
            cells = [f"{mean_and_deviation(teacher)}{theirs[0]}", f"{mean_and_deviation(taught)}{theirs[1]}"]
            cells += [difference(taught, alone), difference(teacher, taught)]
            cells += [finetuned(row), f"{epochs(f'teacher-{arch}', teacher)}, {epochs(row, taught)}"]
            cells += [f"{median_of(teacher, 'wall_seconds')}, {median_of(taught, 'wall_seconds')}"]
            lines.append(f"| {arch}{longer} | {' | '.join(cells)} | {len(taught) or '-'} |")
    return [*lines, "", measured_on({name: runs_of(budget, name) for name in recipes})]


def methods() -> list[str]:
    """The lines of the table of methods: a student alone, and taught by each of them; the best first."""
    found = {name: runs_of("methods", name) for name in rows("methods")}
    lines = [
        "| run | trained by | with | test accuracy | gain over CE | agreement with the teacher | n |",
        "|---|---|---|---|---|---|---|",
    ]
    finished = {name: runs for name, runs in found.items() if runs and not diverged(runs)}
    for name in sorted(finished, key=lambda name: mean(finished[name]), reverse=True):
        runs = finished[name]
        used = re.search(r"  with (.*?)(;|$)", runs[0]["formula"] or "")
        gain = "" if name == "ce" else difference(runs, found["ce"])
        agreement = "" if name == "ce" else median_of(runs, "agreement", 2)
        cells = [
            runs[0]["trained_by"],
            used[1] if used else "",
            mean_and_deviation(runs),
            gain,
            agreement,
            str(len(runs)),
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    for name, runs in found.items():
        if name not in finished:
            lines.append(f"| `{name}` |  |  | {'diverged' if runs else '-'} | - | - | {len(runs) or '-'} |")
    return [*lines, "", measured_on(found)]


def tuning() -> list[str]:
    """Returns the lines of the table of weights: the accuracy of each method on held-out images, the best one bold."""
    names = list(dict.fromkeys(name.rpartition("-x")[0] for name in rows("tuning")))
    found = {name: [runs_of("tuning", f"{name}-x{factor:g}") for factor in FACTORS] for name in names}
    lines = [
        "| method | " + " | ".join(f"{factor:g} times" for factor in FACTORS) + " |",
        "|---" * (1 + len(FACTORS)) + "|",
    ]
    for name, tried in found.items():
        cells = ["diverged" if diverged(runs) else f"{held_out(runs):.2f}" if runs else "-" for runs in tried]
        best = FACTORS.index(best_factor(name))
        cells[best] = f"**{cells[best]}**" if all(tried) and not diverged(tried[best]) else cells[best]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return [*lines, "", measured_on({name: [run for runs in tried for run in runs] for name, tried in found.items()})]


def held_out(runs: Sequence[dict[str, Any]]) -> float:
    """Returns the mean accuracy of the last epoch on held-out images, in percent; 0 where a run has diverged.

    Raises UserError.
    """
    if diverged(runs):
        return 0.0
    try:
        return statistics.fmean(run["last_epoch"]["val_accuracy"] for run in runs)
    except (KeyError, TypeError):
        raise UserError(f"a record in {RECORDS / 'tuning'} has no accuracy on held-out images") from None


def draw(path: Path, budget: str = LEADING) -> None:
    """Writes README's table as a figure: the student alone, taught, and the teacher. Raises UserError."""
    from distill.report import figures

    figures.check_packages("matplotlib")
    points: dict[str, list[tuple[str, float, float]]] = {"student, CE": [], "student, KD": [], "teacher": []}
    for name, taught_by in students(budget).items():
        alone, epochs = runs_of(budget, name), "" if name == "student" else f", {name.removeprefix('student-')} epochs"
        for teacher, row in taught_by.items():
            if taught := runs_of(budget, row):
                place = f"{teacher}{epochs}"
                for line, runs in (("student, CE", alone), ("student, KD", taught)):
                    points[line] += [(place, mean(runs), deviation(runs))] if runs else []
                points["teacher"].append((place, taught[0]["teacher_accuracy"], 0.0))
    if not points["teacher"]:
        raise UserError(f"no student of the table {budget} has been taught: there is nothing to draw")
    lines = {figures.Line(name, place): of_line for place, (name, of_line) in enumerate(points.items())}
    arch = RECIPES["student"].arch
    figures.write_svg(figures.accuracies(lines, f"{arch} on CIFAR-10, alone and taught"), path)


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


def measured_on(found: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Returns a line on machines and commits of the runs of a table, and on the teacher's precisions if they differ.

    found: the runs of each row, by its name.
    """
    runs = [run for of_row in found.values() for run in of_row]
    if not runs:
        return "Measured on: nothing yet."
    devices = sorted({run["device"] for run in runs})
    commits = sorted({re.sub(r"(?<=^\w{7})\w*", "", str(run["commit"])) for run in runs})
    line = f"Measured on: {'; '.join(devices)}; commits {', '.join(commits)}."
    of_precision: dict[str, list[str]] = {}
    for name, of_row in found.items():
        known = [run["teacher_precision"] for run in of_row if run.get("teacher_precision")]  # not of a diverged run
        for precision in sorted({measured["precision"] for measured in known}):
            of_precision.setdefault(precision, []).append(f"`{name}`")
    if len(of_precision) > 1:
        listed = [f"in {precision} for {', '.join(names)}" for precision, names in of_precision.items()]
        line += f" The teacher ran {'; '.join(listed)}."
    return line


def runs_of(budget: str, name: str) -> list[dict[str, Any]]:
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


def diverged(runs: Sequence[dict[str, Any]]) -> bool:
    """Whether one of the runs has ended without a result, its loss not being finite."""
    return any(run["test_accuracy"] is None for run in runs)


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
    lacking = not (high and low) or diverged([*high, *low])
    return "-" if lacking else f"{mean(high) - mean(low):+.2f}"


def median_of(runs: Sequence[dict[str, Any]], key: str, places: int = 0) -> str:
    """The median of a figure."""
    return f"{statistics.median(run[key] for run in runs):.{places}f}" if runs else "-"
