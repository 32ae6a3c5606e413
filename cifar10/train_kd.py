"""Train a small network on small images, taught by a big one.

bash scripts/trainKD.sh                                               EfficientNet-B0 from ResNeXt29_2x64d
bash scripts/trainKD.sh --recipe student_kd --teacher-arch resnet152  the recommended form
bash scripts/trainKD.sh --data sample --recipe sample_student_kd      on the embedded sample, minutes on a CPU
bash scripts/trainKD.sh --teacher-arch resnet152 --teacher-checkpoint ckpt.pth --T 4 --w 0.9
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: python cifar10/train_kd.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cifar10 import train_ce
from cifar10.recipes import RECIPES
from distill.config import cli
from distill.config.recipe import Options, Recipe


def main(argv: Sequence[str]) -> None:
    recipe, options = cli.parse(
        argv,
        prog="trainKD.sh",
        recipes=RECIPES,
        default="kd",
        description=f"Train a student taught by a teacher.\n\n  {cli.LOSS_FORMULA}\n\n{cli.LOSS_LEGEND}",
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
    from cifar10.teachers import check_feature_points, load_teachers, show_features
    from distill.parallel.devices import start
    from distill.run.directory import identity, open_run
    from distill.teacher.cached import cache_teachers, measure_top_k
    from distill.teacher.report import agreement
    from distill.training.engine import fit
    from distill.training.evaluation import evaluate_student, to_evaluate
    from distill.training.objectives import objective
    from distill.training.wrap import check_batch_norm

    device = start(options.device, deterministic=options.deterministic)
    assert recipe.teacher_arch
    recipe = replace(recipe, arch=resolve(recipe.arch), teacher_arch=",".join(map(resolve, recipe.teacher_archs)))
    data = load_data(options.data, workers=options.workers, skip_bad_images=options.skip_bad_images)
    print(data)
    training, tests = prepare(data, recipe, device)
    options = to_evaluate(options, recipe, data)
    student, init_digest = build_student(recipe, data.classes, options, device, training.examples())
    if options.evaluate:
        return evaluate_student(student, tests["test"])
    if options.show_features:
        show_features(recipe, options, student, data)
        return None
    check_feature_points(recipe, student, len(data.classes))
    check_batch_norm(student, recipe.arch, recipe, options.device)  # before a teacher is trained
    facts = identity(data, init_digest, options.device)
    with open_run(options, recipe, data) as run:
        run.check(recipe, facts, **options.allowed)  # before hours of a teacher's training
        if not options.teacher_checkpoint and (summary := run.report(recipe)):
            return summary
        began = run.recorded("teacher_precision"), run.recorded("data_digest")  # a run goes on with its teacher
        teachers, known = load_teachers(recipe, options, data, tests["test"], train_ce.train, *began)
        facts |= {"teacher_digest": teachers.digest, "teacher_precision": known.precision["precision"]}
        if summary := run.claim(recipe, facts, device, **options.allowed):
            return summary
        cached = cache_teachers(recipe, options, data, training, teachers)
        error = measure_top_k(recipe, student, tests["test"], known)
        aim = objective(recipe, student, teachers.first, training, options.device)
        given = {"student": student, "loss": aim, "data": training, "teacher": cached, "tests": tests}
        fitted = fit(run, recipe, options, **given, facts=facts)
        teachers.check_untouched()
        return run.finish(
            recipe,
            facts,
            student,
            **fitted.to_dict(),
            data_content=data.content,
            views=training.plan.order.view_count or recipe.epochs,
            teacher_accuracy=known.accuracy,
            teacher_precision=known.precision,
            top_k_error=error,
            agreement=agreement(fitted.test.predictions, known.logits.argmax(1)),
        )


if __name__ == "__main__":
    cli.run(main)
