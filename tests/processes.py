"""What test_processes.py starts in one process and in two: python tests/processes.py CASE ...

steps NPZ PHOTOS DIRECTORY: four cases, one after the other, as a process takes seconds to start; what each finds is
written to DIRECTORY/CASE.
  gradient: one step with BatchNorm in eval mode, then an evaluation.
  overhaul: the same, with features of a teacher and the connectors to them.
  features: one step by each method on features; a process alone takes those that compare images in two halves.
  photos: an evaluation of photos.
broken PHOTOS FLAGS -- OUTPUT ...: `train.sh` of photos that nobody has looked at before, for each OUTPUT.
nan NPZ DIRECTORY: the loss of the last process is not a number in step 2.
"""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from cifar10.data import load_data, prepare
from cifar10.models import CIFAR_INPUT, MODELS, build_student
from distill.config import cli
from distill.config.recipe import Options, Recipe
from distill.data.datasets import Batch
from distill.losses import FEATURES
from distill.losses.kd_loss import KD
from distill.losses.overhaul import NoLogits, Overhaul
from distill.models.classifier import Classifier
from distill.parallel import devices, processes
from distill.run.run import Run
from distill.teacher.teacher import Teacher
from distill.training.engine import fit
from distill.training.evaluation import evaluate
from distill.training.objectives import CrossEntropy, Objective, Step, build_loss
from distill.training.stop import Stopped
from distill.training.wrap import wrap_parallel
from imagenet import survey, train_ce
from imagenet.data import PhotoTestData
from imagenet.data import load_data as load_data_of_photos
from imagenet.loader import Workers
from imagenet.models import build_student as build_photo_student
from imagenet.recipes import STANDARD
from tests.runs import CPU, tiny


class Unlucky(CrossEntropy):
    """NaN from its second call on, in the last process alone."""

    calls = 0

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        step = super().__call__(student, batch)
        Unlucky.calls += 1
        bad = Unlucky.calls > 1 and processes.rank() == processes.world_size() - 1
        return step._replace(loss=step.loss * float("nan")) if bad else step


def write(result: dict[str, Any], directory: Path) -> None:
    torch.save(result, directory / f"{processes.world_size()}-{processes.rank()}.pt")


def evaluate_photos(source: str, directory: Path) -> None:
    """A ResNet-18 with weights of its own on val/."""
    with Workers(1) as workers:
        photos = load_data_of_photos(source, workers)
        recipe = replace(STANDARD, arch="resnet18", image_size=32)
        student, _ = build_photo_student(recipe, photos.classes, Options(), CPU)
        test = PhotoTestData(photos.val_files, photos.val_labels, student.spec, workers, CPU, "pillow")
        found = evaluate(student, test)
    write({"predictions": found.predictions, "found": found.to_dict()}, directory)


def step_by_features(npz: str, directory: Path) -> None:
    """The gradients of each method on features, of a student in eval mode, and the memories of crd after the step."""
    data = load_data(npz)
    teacher = Teacher(tiny(24, 1))
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name in FEATURES:
        recipe = Recipe(epochs=1, batch_size=8, warmup=0, teacher_arch="tiny", method=KD())
        more = {"negatives": 10, "contrast_temperature": 0.5} if name == "crd" else {}
        recipe = recipe.with_flags({"features": name, **more})
        training, _ = prepare(data, recipe, CPU)
        aim = build_loss(recipe, tiny(16, 2), teacher, training)
        learner = aim.model
        assert learner
        step = wrap_parallel(learner, CPU, recipe, "cpu").eval()
        batch = next(training.batches(0))
        halves = FEATURES[name].correlates_images and processes.world_size() == 1
        parts = batch.split(2) if halves else [batch]
        for part in parts:
            (aim(step, part).loss / len(parts)).backward()
        result[name] = {key: p.grad for key, p in learner.named_parameters() if p.grad is not None}
        if aim.memory:
            result[name] |= {f"memory.{key}": value for key, value in aim.memory.state_dict().items()}
    write(result, directory)


def recipe_of(parts: int) -> Recipe:
    return Recipe(epochs=2, batch_size=8, lr=0.01, warmup=0, dropout=0.0, accumulate=parts)


def one_step(case: str, npz: str, directory: Path) -> None:
    """In float64: float32's own rounding grows to 1e-4 of the largest gradient on some processors."""
    recipe = recipe_of(processes.world_size() if case == "gradient" else 1)
    data = load_data(npz)
    training, tests = prepare(data, recipe, CPU)
    student, _ = build_student(recipe, data.classes, Options(), CPU)
    aim: Objective = CrossEntropy()
    if case == "overhaul":
        torch.manual_seed(5)
        teacher = Teacher(Classifier(MODELS.build("resnet18", len(data.classes)), CIFAR_INPUT).double())
        with_features = replace(recipe, teacher_arch="resnet18", method=NoLogits(), features=Overhaul())
        aim = build_loss(with_features, student, teacher, training)
    learner = (aim.model or student).double()
    norms = [module for module in learner.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():  # or deep activations, and gradients with them, would be too small to compare
        learner(data.train_images)
    for module in norms:
        module.eval()
        module.train = lambda _mode=True, module=module: module  # type: ignore[method-assign]
    facts = {"world_size": processes.world_size()}
    with Run(directory / f"run{processes.world_size()}", recipe, Options(steps=1), facts) as run, suppress(Stopped):
        fit(run, student=student, loss=aim, data=training, tests=tests)
    found = evaluate(student, tests["test"])
    gradients = {k: p.grad for k, p in (aim.model or student).named_parameters() if p.grad is not None}
    write({"gradients": gradients, "predictions": found.predictions, "found": found.to_dict()}, directory)


def unlucky(npz: str, directory: Path) -> None:
    recipe = recipe_of(1)
    data = load_data(npz)
    training, tests = prepare(data, recipe, CPU)
    student, _ = build_student(recipe, data.classes, Options(), CPU)
    facts = {"world_size": processes.world_size()}
    with Run(directory / f"run{processes.world_size()}", recipe, Options(), facts) as run:
        try:
            fit(run, student=student, loss=Unlucky(), data=training, tests=tests)
        except Stopped:
            unchanged = torch.stack([p.detach().double().sum() for p in student.parameters()])
            torch.save(unchanged, directory / f"weights-{processes.rank()}.pt")
            raise


def main(argv: list[str]) -> None:
    with processes.leaving():
        devices.start("cpu")
        cases(argv)


def cases(argv: list[str]) -> None:
    if argv[0] == "broken":
        survey.FIRST, survey.look = 0, lambda *_: survey.Findings()
        end = argv.index("--")
        for output in argv[end + 1 :]:
            train_ce.main([*argv[1:end], "--output", output])
        return
    if argv[0] == "nan":
        unlucky(argv[1], Path(argv[2]))
        return
    npz, photos, directory = argv[1], argv[2], Path(argv[3])
    for case in ("gradient", "overhaul", "features", "photos"):
        torch.manual_seed(0)  # so that no case depends on the one before: each case is of itself alone
        place = directory / case
        place.mkdir(parents=True, exist_ok=True)
        if case == "features":
            step_by_features(npz, place)
        elif case == "photos":
            evaluate_photos(photos, place)
        else:
            one_step(case, npz, place)


if __name__ == "__main__":
    cli.run(main)
