"""Makes small files of finished runs, to keep in git: weights in float16, and a line on each in checkpoints/README.md.

    python scripts/publish.py checkpoints/cifar10-cpu/student-seed0 --data DIR

A file is checkpoints/published/ARCH-ce.pt or ARCH-kd.pt, with weights, recipe, data and commit; its accuracy is that of
the very file. `--teacher-checkpoint published` takes the one of the teacher's architecture. A file of that name, if
there is one, is replaced once the new one has been measured; one of a network that was trained on other images only
with --replace.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from distill.config import cli  # noqa: E402
from distill.config.recipe import Options, Recipe  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import option, validate  # noqa: E402
from scripts import results  # noqa: E402

if TYPE_CHECKING:
    from cifar10.task import SmallImages

README = ROOT / "checkpoints" / "README.md"
HEAD = "| file | trained by | data | accuracy | epochs | commit | sha256 |\n|---|---|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Publish:
    """The flags of this script."""

    run: str | None = option(None, "directory of a finished run on small images", group="what")
    data: str | None = option(None, "what it is measured on: 'sample', a directory or a .npz file", group="what")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="how")
    replace: bool = option(False, "replace a file of a network that was trained on other images", group="what")

    def __post_init__(self) -> None:
        validate(self)


def main(argv: Sequence[str]) -> None:
    options = cli.parse_flags(argv, Publish(), prog="publish.py", description=__doc__ or "", positional="run")
    if not options.run:
        raise UserError("a run is needed; --help shows an example")
    run = Path(options.run)
    summary = results.read(run)
    if summary is None:
        raise UserError(f"{run} is not finished")
    from cifar10.task import PUBLISHED, SmallImages
    from distill.files import checkpoint

    name = summary["data"]["name"]
    if not summary.get("data_content"):
        raise UserError(f"{run} was trained on photos: only networks for small images are published")
    if not options.data and name != "cifar10":  # nothing is downloaded for another run
        raise UserError(f"{run} was trained on {name}: name that by --data")
    task = SmallImages(Recipe(arch=summary["arch"]), Options(data=options.data, device=options.device))
    data = task.data
    if data.content != summary["data_content"]:
        raise UserError(f"{run} was trained on {name}, with other images than those of --data")
    path = PUBLISHED / f"{summary['arch']}-{summary['objective']}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not options.replace and checkpoint.load(path).get("data_content") != data.content:
        raise UserError(f"{path} is of a network that was trained on other images; --replace takes this one instead")
    new = path.with_name(f"{path.name}.new")  # the former file stays where this one cannot be measured
    try:
        write(new, run, summary, data.classes)
        accuracy = measure(new, task)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    config = json.loads((run / "config.json").read_text())
    theirs = config["recipe"].get("pretrained") and not config["starts"][0].get("init")
    started_from = "from ImageNet weights" if theirs else "finetuned"
    line = describe(path, summary, accuracy, started_from if config["facts"]["init_digest"] else "")
    checkpoint.write_atomically(README, with_line(README.read_text(), line).encode())
    print(line)


def write(path: Path, run: Path, summary: dict[str, Any], classes: Sequence[str]) -> None:
    """Writes the weights that count (with --ema the average) in float16, and what is needed to use them. `classes`: of
    the data, in its order."""
    from cifar10.models import CIFAR_INPUT
    from distill.files import checkpoint
    from distill.models import weights

    given = weights.load(run / checkpoint.LAST)
    half = {key: value.half() if value.is_floating_point() else value for key, value in given.state.items()}
    known = {key: summary[key] for key in ("data", "data_content", "commit", "torch")}
    described = {"classes": list(classes), "input": (given.spec or CIFAR_INPUT).to_dict()}
    recipe = dict(given.recipe or {})
    checkpoint.save(
        path, {"format": 1, "student": half, "arch": summary["arch"], "recipe": recipe, **described, **known}
    )


def measure(path: Path, task: "SmallImages") -> float:
    """Returns the percent of the test images that the network in `path` gets right."""
    from distill.models import weights
    from distill.parallel.devices import choose_precision
    from distill.training.evaluation import evaluate

    given = weights.load(path)
    network = task.find_trained(given.arch or "", given)
    classifier = task.build_classifier(network, given, choose_precision("float32", task.device))
    return evaluate(classifier, task.test_data(network.spec)).accuracy


def describe(path: Path, summary: dict[str, Any], accuracy: float, started_from: str) -> str:
    """A line of the table; `started_from`: words for the weights that the run was given, "" for random ones."""
    trained_by = ", ".join(filter(None, (summary["trained_by"], started_from)))
    cells = [f"`{path.name}`", trained_by, summary["data"]["name"], f"{accuracy:.2f} %"]
    commit = re.sub(r"(?<=^.{12})\w+", "", str(summary["commit"]))
    cells += [str(summary["epochs"]), commit, hashlib.sha256(path.read_bytes()).hexdigest()]
    return f"| {' | '.join(cells)} |"


def with_line(text: str, line: str) -> str:
    """checkpoints/README.md with `line` in its table, in place of the one of the same file."""
    head, table, tail = text.partition(HEAD)
    if not table:
        return f"{text.rstrip()}\n\n{HEAD}{line}\n"
    rows = re.match(r"(?:\|.*\n)*", tail)
    lines = rows[0].splitlines() if rows else []
    kept = [other for other in lines if other.split("|")[1] != line.split("|")[1]]
    return head + HEAD + "\n".join(sorted([*kept, line])) + "\n" + tail[sum(len(row) + 1 for row in lines) :]


if __name__ == "__main__":
    cli.run(main)
