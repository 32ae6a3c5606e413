"""Train a network on small images by cross-entropy.

bash scripts/trainCE.sh                                        EfficientNet-B0 on data/cifar10
bash scripts/trainCE.sh --data sample --recipe sample_student  on the embedded sample, a minute on a CPU
bash scripts/trainCE.sh --recipe teacher --arch resnet152      a teacher
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python cifar10/train_ce.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cifar10.recipes import RECIPES
from distill.config import cli
from distill.config.recipe import Options, Recipe


def main(argv: Sequence[str]) -> None:
    recipe, options = cli.parse(
        argv,
        prog="trainCE.sh",
        recipes=RECIPES,
        default="student",
        description="Train a network by cross-entropy.",
        examples=(__doc__ or "").split("\n\n", 1)[1],
    )
    train(recipe, options)
    from distill.parallel.processes import leave

    leave()


def train(recipe: Recipe, options: Options) -> dict[str, Any] | None:
    """Start or continue the run of `recipe`. Returns its summary, also if it was finished before."""
    # torch takes seconds to load: only now, after the flags were found right
    from cifar10.data import load_data, prepare
    from cifar10.models import build_student, resolve
    from distill.parallel.devices import start
    from distill.run.directory import identity, open_run
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student, to_evaluate
    from distill.training.objectives import CrossEntropy

    device = start(options.device, deterministic=options.deterministic)
    recipe = replace(recipe, arch=resolve(recipe.arch))
    data = load_data(options.data, workers=options.workers, skip_bad_images=options.skip_bad_images)
    print(data)
    training, tests = prepare(data, recipe, device)
    options = to_evaluate(options, recipe, data)
    student, init_digest = build_student(recipe, data.classes, options, device, training.examples())
    facts = identity(data, init_digest, options.device)
    if options.evaluate:
        return evaluate_student(student, tests["test"])
    with open_run(options, recipe, data) as run:
        if summary := run.claim(recipe, facts, device, **options.allowed):
            return summary
        fitted = fit(
            run,
            recipe,
            options,
            student=student,
            loss=CrossEntropy(recipe.label_smoothing),
            data=training,
            tests=tests,
            facts=facts,
        )
        return run.finish(
            recipe,
            facts,
            student,
            views=training.plan.order.view_count or recipe.epochs,
            **fitted.to_dict(),
            data_content=data.content,
        )


if __name__ == "__main__":
    cli.run(main)
