"""Train what a table of results lacks, and write the table into cifar10/README.md.

    bash scripts/reproduce.sh cifar10                                        the table of results: for a GPU
    bash scripts/reproduce.sh cifar10 --budget cpu --only student            a row of what 2 CPU cores train in hours
    bash scripts/reproduce.sh cifar10 --budget cpu --only student --seed 2   one seed of it, for a job of its own
    bash scripts/reproduce.sh tuning --data SUBSET                           weights of methods, on held-out images
    bash scripts/reproduce.sh methods --teacher-arch resnet18 --data ~/pets  every method with one budget, on your data

Called again, it continues what was cut and skips what is finished. --teacher-checkpoint published takes the teachers
that come with this repository, and trains none for cifar10: --only names the rows that have one. The other flags are
those of trainKD.sh, for every run; what is not given is as the row has it, whatever default stands below. --show-recipe
prints what would run. Only runs as the table has them are recorded: other flags, data or teachers make a table of their
own, which is printed. A run that diverges is a line of tuning and of methods, and the next one starts; it ends the
command for cifar10. NPROC and NNODES as for trainKD.sh.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from cifar10 import train_ce, train_kd  # noqa: E402
from cifar10.recipes import RECIPES  # noqa: E402
from distill.config import cli  # noqa: E402
from distill.config.environment import is_joined  # noqa: E402
from distill.config.recipe import Options, Recipe  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import flag, option  # noqa: E402
from distill.training.stop import Diverged  # noqa: E402
from scripts import results, tables  # noqa: E402

ELSEWHERE = ("output", "fresh", "extend", "resume", "evaluate", "show_features")  # they are for one run
FIXED = {"cifar10": ("arch", "teacher_arch", "init", "recipe"), "tuning": ("recipe",)}  # by the table


@dataclass(frozen=True)
class Reproduce(Options):
    """The flags of trainKD.sh and these."""

    elsewhere: ClassVar[str] = "--runs DIR"

    table: str = option("cifar10", "the table", group="table", choices=("cifar10", "methods", "tuning"))
    budget: str = option(
        "full",
        "of cifar10: full is for a GPU; cpu for 2 CPU cores, 1 to 24 hours a run",
        group="table",
        choices=tuple(tables.BUDGETS),
    )
    seeds: int | None = option(
        None,
        "students have the seeds 0 to N - 1, teachers 0 (default: 3; methods, tuning: 1); --seed N trains seed N alone",
        group="table",
        least=1,
    )
    only: str | None = option(None, "these rows, with commas between them, and what they need", group="table")
    runs: str | None = option(
        None, "where the runs go (default: checkpoints/cifar10-BUDGET, methods or tuning)", group="table"
    )


@dataclass(frozen=True)
class Run:
    """A run of the table: its name, what it is, and where it finds things."""

    name: str
    recipe: Recipe
    options: Options


def main(argv: Sequence[str]) -> None:
    given, options = cli.read_flags(
        argv,
        RECIPES["kd"],
        Reproduce(),
        prog="reproduce.sh",
        description=__doc__ or "",
        positional="table",
    )
    table = options.budget if options.table == "cifar10" else options.table
    planned = plan(table, given, options)
    differing = filter(None, (results.differs(table, run.name, run.recipe) for run in planned))
    if not is_joined() and (differs := next(differing, None)):  # for several processes launch.sh's check has said it
        print(f"note: {differs}: not the table's, so it is not recorded", file=sys.stderr)
    processes = [os.environ.get(name, "").strip() or "1" for name in ("NPROC", "NNODES")]
    if not is_joined() and processes != ["1", "1"]:
        print("note: with NPROC or NNODES each process takes a part of a batch: nothing is recorded", file=sys.stderr)
    if options.show_recipe:
        print(json.dumps([{"run": run.name, **run.recipe.to_dict()} for run in planned], indent=2))
        return
    from distill.parallel.devices import devices, start
    from distill.parallel.processes import leaving

    if options.device == "auto" and devices("auto")[1:] and not is_joined():
        print("using cuda:0 alone: on several GPUs BatchNorm sees less, and the table would depend on their number")
        planned = [replace(run, options=replace(run.options, device="cuda:0")) for run in planned]
    with leaving():
        announce(planned, start(planned[0].options.device))  # from here on one of several processes prints
        train(table, planned)


def train(table: str, planned: Sequence[Run]) -> None:
    """Trains what is not finished of the runs, records what belongs to the table, and prints them all."""
    from distill.parallel.processes import on_main

    recorded = False
    for run in planned:
        print(f"== {run.name}")
        try:
            (train_kd if run.recipe.teacher_arch else train_ce).train(run.recipe, run.options)
        except Diverged as error:
            if table in tables.BUDGETS:
                raise
            print(error)  # the others can be compared all the same
        recorded |= on_main(results.record)(table, [Path(run.options.output or "")])
    on_main(results.main)([str(run.options.output) for run in planned])
    if recorded:
        on_main(results.main)([])
        print("README.md and cifar10/README.md have the tables of checkpoints/records/")


def announce(planned: Sequence[Run], device: Any) -> None:
    """Prints how long each run still takes here, about, without the teacher's forward passes, and all together."""
    from cifar10 import models
    from cifar10.data import load_data
    from cifar10.task import training_seconds
    from distill.config.output import format_duration
    from distill.parallel.processes import on_main

    left = on_main(epochs_left)(planned)  # one answer for all processes
    if not any(left):
        return
    options = planned[0].options
    data = load_data(options.data, workers=options.workers, skip_bad_images=options.skip_bad_images)
    seconds: dict[str, float] = {}
    total = 0.0
    for run, epochs in zip(planned, left, strict=True):
        recipe, arch = run.recipe, run.recipe.arch
        if epochs and arch not in seconds:
            seconds[arch] = training_seconds(replace(recipe, epochs=1, sizes=None), data, device)
        size = models.find(arch, recipe.image_size).spec.size
        own = recipe.whole_epochs(size, recipe.epochs - epochs) * seconds.get(arch, 0.0)
        total += own
        print(f"{run.name}: epochs left {epochs}, about {format_duration(own)}")
    print(f"together about {format_duration(total)}, without the teachers' forward passes")


def epochs_left(planned: Sequence[Run]) -> list[int]:
    """Returns how many epochs each run has still to train."""
    from distill.run.directory import RunDirectory

    done = [len(RunDirectory(Path(run.options.output or "")).records()) for run in planned]
    return [max(run.recipe.epochs - count, 0) for run, count in zip(planned, done, strict=True)]


def plan(table: str, given: dict[str, Any], options: Reproduce) -> list[Run]:
    """The runs in their order. Raises UserError for flags that a table cannot have, before anything is trained."""
    from cifar10.task import find_file
    from distill.run.directory import CHECKPOINTS
    from distill.teacher.ensemble import member_files

    usual = Options()
    for name in (*ELSEWHERE, *FIXED.get(options.table, ())):
        if name in given or getattr(options, name, None) != getattr(usual, name, None):
            raise UserError(f"{flag(name)} is for one run, not for this table")
    if "seed" in given and options.seeds:
        raise UserError("--seed N is one seed, --seeds N are the seeds 0 to N - 1: give one of them")
    published = options.teacher_checkpoint == "published"
    if options.table == "cifar10" and options.teacher_checkpoint and not published:
        raise UserError("--teacher-checkpoint must be 'published' for this table, which trains its teachers otherwise")
    rows = tables.rows(table)
    if options.recipe:
        rows = tables.by_method(RECIPES[cli.find_recipe(options.recipe, RECIPES, "kd")])
    only = _wanted(options.only, rows, teachers=not published)
    directory = (
        Path(options.runs)
        if options.runs
        else CHECKPOINTS / (f"cifar10-{table}" if options.table == "cifar10" else table)
    )

    def run(name: str, seed: int) -> Run:
        ours = rows[name]
        mine = {key: value for key, value in given.items() if ours.teacher_arch or key not in cli.DISTILLATION_FIELDS}
        where: dict[str, Any] = {"output": str(directory / f"{name}-seed{seed}"), "recipe": None}
        if not ours.teacher_arch:
            where["teacher_checkpoint"] = None
        elif options.table == "cifar10" and not published:
            where["teacher_checkpoint"] = str(directory / f"teacher-{ours.teacher_arch}-seed0" / "last.pt")
        elif not options.teacher_checkpoint and "teacher_arch" not in given and not options.recipe:
            where["teacher_checkpoint"] = "published"
        if name.endswith("-finetuned"):
            where["init"] = str(directory / f"student-seed{seed}" / "last.pt")
        return Run(f"{name}-seed{seed}", ours.with_flags({**mine, "seed": seed}), replace(options, **where))

    count = options.seeds or (3 if table in tables.BUDGETS else 1)
    seeds: Sequence[int] = [given["seed"]] if "seed" in given else range(count)
    teachers = [name for name in only if name.startswith("teacher-")]
    students = [name for name in only if name not in teachers]
    runs = [run(name, 0) for name in teachers] + [run(name, seed) for seed in seeds for name in students]
    for other in runs:
        files = member_files(other.recipe, other.options)
        for arch, file in zip(other.recipe.teacher_archs, files, strict=True):
            find_file(arch, replace(other.options, teacher_checkpoint=file))  # a published one that there is not
    return runs


def _wanted(only: str | None, rows: dict[str, Recipe], teachers: bool) -> list[str]:
    """The rows named in `only`, else all, and those that they need, `teachers` too; as `rows` are ordered. Raises
    UserError."""
    names = only.split(",") if only is not None else [name for name in rows if teachers or name[:8] != "teacher-"]
    for name in names:
        if name not in rows:
            raise UserError(f"--only must be of {', '.join(rows)}, got {name!r}")
    for name in list(names):
        if teachers and (teacher := f"teacher-{rows[name].teacher_arch}") in rows:
            names.append(teacher)
        if name.endswith("-finetuned"):
            names.append("student")
    return [name for name in rows if name in names]


if __name__ == "__main__":
    cli.run(main)
