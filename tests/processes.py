"""What test_processes.py starts in one process and in two: python tests/processes.py CASE NPZ DIRECTORY.

gradient: one step with BatchNorm in eval mode, then an evaluation; both are written to DIRECTORY.
overhaul: the same, with features of a teacher and the connectors to them.
features: one step by each method on features; a process alone takes those that compare images in two halves.
photos: an evaluation of photos.
broken: `train.sh NPZ FLAGS` for photos that nobody has looked at before; its flags follow in place of DIRECTORY.
nan: the loss of the last process is not a number in step 2.
"""

import sys
from dataclasses import replace
from pathlib import Path

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
from tests.runs import tiny


class Unlucky(CrossEntropy):
    """NaN from its second call on, in the last process alone."""

    calls = 0

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        step = super().__call__(student, batch)
        Unlucky.calls += 1
        bad = Unlucky.calls > 1 and processes.rank() == processes.world_size() - 1
        return step._replace(loss=step.loss * float("nan")) if bad else step


def evaluate_photos(source: str, directory: Path) -> None:
    """A ResNet-18 with weights of its own on val/."""
    with Workers(1) as workers:
        photos = load_data_of_photos(source, workers)
        recipe = replace(STANDARD, arch="resnet18", image_size=32)
        student, _ = build_photo_student(recipe, photos.classes, Options(), torch.device("cpu"))
        test = PhotoTestData(photos.val_files, photos.val_labels, student.spec, workers, torch.device("cpu"), "pillow")
        found = evaluate(student, test)
    result = {"predictions": found.predictions, "found": found.to_dict()}
    torch.save(result, directory / f"{processes.world_size()}-{processes.rank()}.pt")


def step_by_features(npz: str, directory: Path) -> None:
    """The gradients of each method on features, of a student in eval mode, and the memories of crd after the step."""
    data = load_data(npz)
    teacher = Teacher(tiny(24, 1))
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name in FEATURES:
        recipe = Recipe(epochs=1, batch_size=8, warmup=0, teacher_arch="tiny", method=KD())
        more = {"negatives": 10, "contrast_temperature": 0.5} if name == "crd" else {}
        recipe = recipe.with_flags({"features": name, **more})
        training, _ = prepare(data, recipe, torch.device("cpu"))
        aim = build_loss(recipe, tiny(16, 2), teacher, training)
        learner = aim.model
        assert learner
        step = wrap_parallel(learner, torch.device("cpu"), recipe, "cpu").eval()
        batch = next(training.batches(0))
        halves = FEATURES[name].correlates_images and processes.world_size() == 1
        parts = batch.split(2) if halves else [batch]
        for part in parts:
            (aim(step, part).loss / len(parts)).backward()
        result[name] = {key: p.grad for key, p in learner.named_parameters() if p.grad is not None}
        if aim.memory:
            result[name] |= {f"memory.{key}": value for key, value in aim.memory.state_dict().items()}
    torch.save(result, directory / f"{processes.world_size()}-{processes.rank()}.pt")


def main(argv: list[str]) -> None:
    if argv[0] == "broken":
        survey.FIRST, survey.look = 0, lambda *_: survey.Findings()
        train_ce.main(argv[1:])
        return
    case, npz, directory = argv[0], argv[1], Path(argv[2])
    device = devices.start("cpu")
    if case == "features":
        step_by_features(npz, directory)
        return
    if case == "photos":
        evaluate_photos(npz, directory)
        return
    one_step = case in ("gradient", "overhaul")
    parts = processes.world_size() if case == "gradient" else 1
    recipe = Recipe(epochs=2, batch_size=8, lr=0.01, warmup=0, dropout=0.0, accumulate=parts)
    data = load_data(npz)
    training, tests = prepare(data, recipe, device)
    student, _ = build_student(recipe, data.classes, Options(), device)
    aim: Objective = CrossEntropy() if case == "gradient" else Unlucky()
    if case == "overhaul":
        torch.manual_seed(5)
        teacher = Teacher(Classifier(MODELS.build("resnet18", len(data.classes)), CIFAR_INPUT).double())
        with_features = replace(recipe, teacher_arch="resnet18", method=NoLogits(), features=Overhaul())
        aim = build_loss(with_features, student, teacher, training)
    if one_step:  # in float64: float32's own rounding grows to 1e-4 of the largest gradient on some processors
        learner = (aim.model or student).double()
        norms = [module for module in learner.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in norms:
            module.momentum = 1.0
        with torch.no_grad():  # or deep activations, and gradients with them, would be too small to compare
            learner(data.train_images)
        for module in norms:
            module.eval()
            module.train = lambda _mode=True, module=module: module  # type: ignore[method-assign]
    options = Options(steps=1 if one_step else None)
    facts = {"world_size": processes.world_size()}
    with Run(directory / f"run{processes.world_size()}", recipe, options, facts) as run:
        try:
            fit(run, student=student, loss=aim, data=training, tests=tests)
        except Stopped:
            if case == "nan":
                unchanged = torch.stack([p.detach().double().sum() for p in student.parameters()])
                torch.save(unchanged, directory / f"weights-{processes.rank()}.pt")
                raise
        found = evaluate(student, tests["test"])
        gradients = {k: p.grad for k, p in (aim.model or student).named_parameters() if p.grad is not None}
        result = {"gradients": gradients, "predictions": found.predictions, "found": found.to_dict()}
        torch.save(result, directory / f"{processes.world_size()}-{processes.rank()}.pt")


if __name__ == "__main__":
    cli.run(main)
