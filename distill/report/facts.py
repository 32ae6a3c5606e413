"""What a report says of runs in words: the table of results, command, commit, machine, time."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.config.output import format_duration
from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.inference.trained import Trained
from distill.report.networks import Reported, Student, archs_of


def result_table(networks: Sequence[Reported], students: Sequence[Student], classes: int) -> dict[str, Any]:
    """Returns head, rows and explanation of the table of results; columns that nobody fills are left out."""
    by_name = {student.network.name: student for student in students}
    columns: dict[str, list[str]] = {
        "network": [
            f"{n.name} ({n.trained.unfinished})" if n.trained and n.trained.unfinished else n.name for n in networks
        ],
        "architecture": [n.arch for n in networks],
        "trained by": [trained_by(n.trained) if n.trained else "" for n in networks],
        "parameters": [f"{n.parameters:,}" for n in networks],
        "epochs": [_epochs(n.trained) if n.trained else "" for n in networks],
        "test accuracy": [f"{n.predictions.accuracy:.2f} %" for n in networks],
    }
    if classes > 5:
        columns["top-5"] = [f"{n.predictions.top5:.2f} %" for n in networks]
    found = [by_name.get(n.name) for n in networks]
    columns["gain over CE"] = [_points(s.gain) if s else "" for s in found]
    columns["gap to the teacher"] = [_points(s.gap) if s else "" for s in found]
    columns["training time"] = [training_time(n.trained) if n.trained else "" for n in networks]
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    told = {
        "gain over CE": "Gain over CE: points of accuracy above the same architecture that was trained by CE.",
        "gap to the teacher": "Gap to the teacher: points of accuracy that the student is below it.",
    }
    rows = list(zip(*kept.values(), strict=True))
    return {
        "head": list(kept),
        "rows": rows,
        "explained": " ".join(text for name, text in told.items() if name in kept),
    }


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def trained_by(trained: Trained) -> str:
    """Returns `CE` or `KD from resnet18`, nothing where nobody says."""
    if trained.summary and trained.summary.get("trained_by"):
        return str(trained.summary["trained_by"])
    if not trained.recipe:
        return ""
    told = {name: trained.recipe.get(name) for name in ("teacher_arch", "method", "features")}
    try:
        return Recipe.from_dict(told).trained_by  # what else a recipe of photos has is of no matter
    except (UserError, TypeError):  # of another version
        archs = archs_of(trained)
        return f"KD from {' + '.join(archs)}" if archs else "CE"


def _epochs(trained: Trained) -> str:
    planned = trained.recipe.get("epochs")
    if trained.unfinished:
        return f"{len(trained.records)} of {planned}"
    return "" if planned is None else str(planned)


def training_time(trained: Trained) -> str:
    """Returns how long training took with all evaluations, of an unfinished run its epochs; nothing without a run."""
    if trained.summary:
        return format_duration(trained.summary["wall_seconds"])
    seconds = sum(record.get("seconds", 0.0) for record in trained.records)
    return format_duration(seconds) if trained.records else ""


def command(argv: Sequence[str]) -> str:
    """Returns what a person types to start the run again, in the root of the repository, from a start's argv."""
    found = re.search(r"(\w+)/(train_\w+)\.py$", argv[0])
    program = f"python -m {found[1]}.{found[2]}" if found else shlex.join(["python", argv[0]])
    return f"{program} {shlex.join(argv[1:])}".rstrip()


def described(network: Reported) -> dict[str, Any]:
    """Returns name, facts and command of the last start of a network's run, or what is known of a file."""
    trained = network.trained
    assert trained
    facts = [("from", str(trained.path)), ("predictions", f"computed in {network.precision}")]
    starts = trained.config.get("starts") or []
    if not starts:
        return {"name": network.name, "facts": facts, "command": ""}
    last, summary = starts[-1], trained.summary or {}
    machine, versions = last.get("machine") or {}, last.get("versions") or {}
    began = f"{starts[0].get('time')}" + (
        f", continued {len(starts) - 1} times, last {last.get('time')}" if starts[1:] else ""
    )
    facts += [
        ("state", trained.unfinished or f"finished, epochs: {trained.recipe.get('epochs')}"),
        ("loss", summary.get("formula") or ""),
        ("recorded", f"test accuracy {summary['test_accuracy']:.2f} %, in {summary['precision']}" if summary else ""),
        ("images", f"{(trained.config.get('facts') or {}).get('images', '')}"),
        ("commit", last.get("commit") or "not from a checkout"),
        ("hardware", ", ".join(filter(None, [machine.get("device"), machine.get("host"), machine.get("system")]))),
        ("software", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("began", began),
        ("time", training_time(trained)),
        ("started in", last.get("cwd") or ""),
    ]
    known = [(name, value) for name, value in facts if value]
    return {"name": network.name, "facts": known, "command": command(last["argv"])}


def unique_names(found: Sequence[Trained]) -> list[str]:
    """Returns a name for each network: its directory's or file's, with the directory above where two are alike."""
    names = [trained.name for trained in found]
    longer = [str(Path(trained.directory.resolve().parent.name) / trained.name) for trained in found]
    names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [f"{name} ({k + 1})" if names.count(name) > 1 else name for k, name in enumerate(names)]
