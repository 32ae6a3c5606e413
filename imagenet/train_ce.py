"""Train a network on photos by cross-entropy.

bash scripts/train.sh DATA --arch resnet18
bash scripts/train.sh DATA --arch efficientnet-b0 --recipe finetune     from its published weights
NPROC=8 bash scripts/train.sh DATA --arch resnet50 --workers 12         a process for each of 8 GPUs
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python imagenet/train_ce.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli
from imagenet.recipes import RECIPES, ImageNetOptions, ImageNetRecipe


def main(argv: Sequence[str]) -> None:
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
    train(recipe, options)
    from distill.parallel.processes import leave

    leave()


def train(recipe: ImageNetRecipe, options: ImageNetOptions) -> dict[str, Any] | None:
    """Start or continue the run of `recipe`. Returns its summary, also if it was finished before."""
    # torch takes seconds to load: only now, after the flags were found right
    from distill.parallel.devices import start
    from distill.run.directory import identity, open_run
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student, to_evaluate
    from distill.training.objectives import CrossEntropy
    from imagenet.data import known_to, load_data, prepare
    from imagenet.loader import Workers
    from imagenet.models import build_student, find
    from imagenet.survey import survey

    device = start(options.device, deterministic=options.deterministic)
    recipe = replace(recipe, arch=find(recipe.arch).arch)
    with Workers(options.workers, options.loader_minutes) as workers:
        photos = load_data(options.data, workers, skip_bad_images=options.skip_bad_images)
        print(photos)
        options = to_evaluate(options, recipe, photos)
        student, init_digest = build_student(recipe, photos.classes, options, device)
        training, tests = prepare(photos, recipe, student.spec, None, workers, device)
        if options.evaluate:
            return evaluate_student(student, tests["test"])
        with open_run(options, recipe, photos) as run:
            photos = known_to(run, photos)
            facts = identity(photos, init_digest, options.device)
            survey(training, tests, workers)
            if summary := run.claim(recipe, facts, device, **options.allowed):
                return summary
            loss = CrossEntropy(recipe.label_smoothing)
            fitted = fit(run, recipe, options, student=student, loss=loss, data=training, tests=tests, facts=facts)
            views = training.plan.order.view_count or recipe.epochs
            return run.finish(recipe, facts, student, views=views, **fitted.to_dict())


if __name__ == "__main__":
    cli.run(main)
