"""Train a network on small images by cross-entropy.

bash scripts/trainCE.sh                                        EfficientNet-B0 on data/cifar10
bash scripts/trainCE.sh --data sample --recipe sample_student  on the embedded sample, a minute on a CPU
bash scripts/trainCE.sh --recipe teacher --arch resnet152      a teacher
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python cifar10/train_ce.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cifar10.recipes import RECIPES
from distill.config import cli
from distill.config.recipe import Options, Recipe


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains. Raises UserError."""
    recipe, options = cli.parse(
        argv,
        prog="trainCE.sh",
        recipes=RECIPES,
        default="student",
        description="Train a network by cross-entropy.",
        examples=(__doc__ or "").split("\n\n", 1)[1],
    )
    from distill.parallel.processes import leaving

    with leaving():
        train(recipe, options)


def train(recipe: Recipe, options: Options) -> dict[str, Any] | None:
    """Starts or continues the run of `recipe`. Returns its summary, also if it was finished before."""
    # torch takes seconds to load: only now, after the flags were found right
    from cifar10.task import SmallImages
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student
    from distill.training.objectives import CrossEntropy
    from distill.training.task import open_run, results

    with SmallImages(recipe, options) as task:
        student = task.build_student()
        if options.evaluate:
            return evaluate_student(student, task.test_data(student.spec))
        training, tests = task.prepare(student.spec)
        with open_run(task, student, training, tests) as (run, _):
            if run.summary:
                return run.summary
            loss = CrossEntropy(recipe.label_smoothing)
            fitted = fit(run, student=student, loss=loss, data=training, tests=tests)
            return run.finish(student, **results(task, fitted, training))


if __name__ == "__main__":
    cli.run(main)
