"""Train a network on photos by cross-entropy.

bash scripts/train.sh DATA --arch resnet18
bash scripts/train.sh DATA --arch efficientnet-b0 --recipe finetune     from its published weights
NPROC=8 bash scripts/train.sh DATA --arch resnet50 --workers 12         a process for each of 8 GPUs
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python imagenet/train_ce.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli
from imagenet.recipes import RECIPES, ImageNetOptions, ImageNetRecipe


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains. Raises UserError."""
    recipe, options = cli.parse(
        argv,
        prog="train.sh",
        recipes=RECIPES,
        default="standard",
        description="Train a network on photos by cross-entropy; with --kd taught by another (train.sh --kd --help).",
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
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student
    from distill.training.objectives import CrossEntropy
    from distill.training.task import open_run, results
    from imagenet.task import PhotoTask

    with PhotoTask(recipe, options) as task:
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
