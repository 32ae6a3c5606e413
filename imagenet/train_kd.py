"""Train a network on photos, taught by a bigger one.

bash scripts/train.sh DATA --arch resnet18 --teacher-arch resnet34
bash scripts/train.sh DATA --arch efficientnet-b0 --teacher-arch resnet152 --kd --T 1 --w 0.5 --workers 16
bash scripts/train.sh DATA --arch efficientnet-b0 --teacher-arch efficientnet-lite2      its weights come by pip
NPROC=8 bash scripts/train.sh DATA --kd --recipe strong_kd --teacher-checkpoint resnet152.pth
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python imagenet/train_kd.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli
from imagenet.recipes import RECIPES, ImageNetOptions, ImageNetRecipe


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains. Raises UserError."""
    recipe, options = cli.parse(
        argv,
        prog="train.sh",
        recipes=RECIPES,
        default="standard_kd",
        description="Train a network on photos, taught by another.",
        examples=(__doc__ or "").split("\n\n", 1)[1],
        options=ImageNetOptions(),
        positional="data",
    )
    from distill.parallel.processes import leaving

    with leaving():
        train(recipe, options)


def train(recipe: ImageNetRecipe, options: ImageNetOptions) -> dict[str, Any] | None:
    """Starts or continues the run of `recipe`. Returns its summary, also if it was finished before."""
    # torch takes seconds to load: only now, after the flags were found right
    from distill.teacher.cached import cache_teachers
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student
    from distill.training.objectives import build_loss, measure_top_k
    from distill.training.task import open_run, results
    from imagenet.task import PhotoTask

    with PhotoTask(recipe, options) as task:
        student = task.build_student()
        if options.evaluate:
            return evaluate_student(student, task.test_data(student.spec))
        training, tests = task.prepare(student.spec)
        if options.show_features:
            task.show_features(student)
            return None
        task.check_student(student)
        with open_run(task, student, training, tests, task.load_teachers) as (run, teachers):
            if run.summary or not teachers:
                return run.summary
            cached = cache_teachers(run.recipe, options, task.data, training, teachers)
            top_k_error = measure_top_k(run.recipe, student, tests["test"], teachers.report)
            loss = build_loss(run.recipe, student, teachers.first, training, options.device)
            fitted = fit(run, student=student, loss=loss, data=training, teacher=cached, tests=tests)
            return run.finish(student, **results(task, fitted, training, teachers, top_k_error))


if __name__ == "__main__":
    cli.run(main)
