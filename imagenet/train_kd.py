"""Train a network on photos, taught by a bigger one.

bash scripts/train.sh DATA --arch resnet18 --teacher-arch resnet34
bash scripts/train.sh DATA --arch efficientnet-b0 --teacher-arch resnet152 --kd --T 1 --w 0.5 --workers 16
bash scripts/train.sh DATA --arch efficientnet-b0 --teacher-arch efficientnet-lite2      its weights come by pip
NPROC=8 bash scripts/train.sh DATA --kd --recipe strong_kd --teacher-checkpoint resnet152.pth
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python imagenet/train_kd.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli
from imagenet.recipes import RECIPES, ImageNetOptions, ImageNetRecipe


def main(argv: Sequence[str]) -> None:
    recipe, options = cli.parse(
        argv,
        prog="train.sh",
        recipes=RECIPES,
        default="standard_kd",
        description=f"Train a network on photos, taught by another.\n\n  {cli.LOSS_FORMULA}\n\n{cli.LOSS_LEGEND}",
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
    from distill.teacher.cached import cache_teachers, measure_top_k
    from distill.teacher.report import agreement
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student, to_evaluate
    from distill.training.objectives import objective
    from distill.training.wrap import check_batch_norm
    from imagenet.data import known_to, load_data, prepare
    from imagenet.loader import Workers
    from imagenet.models import build_student, find
    from imagenet.survey import survey
    from imagenet.teachers import check_feature_points, find_teachers, load_teachers, show_features

    device = start(options.device, deterministic=options.deterministic)
    known_teachers = find_teachers(recipe, options)
    largest = max((teacher.spec for teacher in known_teachers), key=lambda spec: spec.size)
    names = ",".join(teacher.arch for teacher in known_teachers)
    recipe = replace(recipe, arch=find(recipe.arch).arch, teacher_arch=names)
    if not options.kd:
        print(f"--teacher-arch {recipe.teacher_arch}: it teaches, as with --kd")
    with Workers(options.workers, options.loader_minutes) as workers:
        photos = load_data(options.data, workers, skip_bad_images=options.skip_bad_images)
        print(photos)
        options = to_evaluate(options, recipe, photos)
        student, init_digest = build_student(recipe, photos.classes, options, device)
        training, tests = prepare(photos, recipe, student.spec, largest, workers, device)
        if options.evaluate:
            return evaluate_student(student, tests["test"])
        if options.show_features:
            show_features(recipe, options, known_teachers[0], student)
            return None
        check_feature_points(recipe, known_teachers[0], student, len(photos.classes))
        check_batch_norm(student, recipe.arch, recipe, options.device)  # before a teacher is trained
        with open_run(options, recipe, photos) as run:
            photos = known_to(run, photos)
            facts = identity(photos, init_digest, options.device)
            survey(training, tests, workers)
            run.check(recipe, facts, **options.allowed)
            precision = run.recorded("teacher_precision")  # a run goes on with what `auto` was where it began
            teachers, known = load_teachers(recipe, options, photos, workers, device, precision)
            facts |= {"teacher_digest": teachers.digest, "teacher_precision": known.precision["precision"]}
            if summary := run.claim(recipe, facts, device, **options.allowed):
                return summary
            cached = cache_teachers(recipe, options, photos, training, teachers)
            error = measure_top_k(recipe, student, tests["test"], known)
            aim = objective(recipe, student, teachers.first, training, options.device)
            given = {"student": student, "loss": aim, "data": training, "teacher": cached, "tests": tests}
            fitted = fit(run, recipe, options, **given, facts=facts)
            teachers.check_untouched()
            found = {"teacher_accuracy": known.accuracy, "teacher_precision": known.precision, "top_k_error": error}
            found["agreement"] = agreement(fitted.test.predictions, known.logits.argmax(1))
            found["views"] = training.plan.order.view_count or recipe.epochs
            return run.finish(recipe, facts, student, **fitted.to_dict(), **found)


if __name__ == "__main__":
    cli.run(main)
