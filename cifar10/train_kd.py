"""Train a small network on small images, taught by a big one.

bash scripts/trainKD.sh                                               EfficientNet-B0 from ResNeXt29_2x64d
bash scripts/trainKD.sh --recipe student_kd --teacher-arch resnet152  the recommended form
bash scripts/trainKD.sh --data sample --recipe sample_student_kd      on the embedded sample, minutes on a CPU
bash scripts/trainKD.sh --teacher-arch resnet152 --teacher-checkpoint ckpt.pth --T 4 --w 0.9
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python cifar10/train_kd.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cifar10 import train_ce
from cifar10.recipes import RECIPES
from distill.config import cli
from distill.config.recipe import Options, Recipe


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains. Raises UserError."""
    recipe, options = cli.parse(
        argv,
        prog="trainKD.sh",
        recipes=RECIPES,
        default="kd",
        description="Train a student taught by a teacher.",
        examples=(__doc__ or "").split("\n\n", 1)[1],
    )
    from distill.parallel.processes import leaving

    with leaving():
        train(recipe, options)


def train(recipe: Recipe, options: Options) -> dict[str, Any] | None:
    """Starts or continues the run of `recipe`. Returns its summary, also if it was finished before."""
    # torch takes seconds to load: only now, after the flags were found right
    from cifar10.task import SmallImages
    from distill.teacher.cached import cache_teachers
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student
    from distill.training.objectives import build_loss, measure_top_k
    from distill.training.task import open_run, results

    with SmallImages(recipe, options, train=train_ce.train) as task:
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
