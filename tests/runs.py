"""What several test files train: a small network with every kind of layer, runs of it, and their state."""

from pathlib import Path

import torch
from torch import nn

from cifar10.data import load_data, prepare
from cifar10.models import CIFAR_INPUT
from distill.config.recipe import Options, Recipe
from distill.files import checkpoint
from distill.losses.kd_loss import KD
from distill.models.classifier import Classifier, InputSpec
from distill.run.run import Run
from distill.teacher.cached import CachedTeacher, LogitCache
from distill.teacher.store import Encoding
from distill.teacher.teacher import Teacher
from distill.training.engine import Fitted, fit
from distill.training.objectives import CrossEntropy, Distillation, Objective, distillation

CPU = torch.device("cpu")
SPEC = InputSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, warmup=0.5)


def small_network(classes: int = 4, seed: int = 0) -> Classifier:
    """Every kind of layer that carries state of its own: convolution, BatchNorm, dropout."""
    torch.manual_seed(seed)
    convolution = nn.Conv2d(3, 8, 3, stride=4)
    head = nn.Linear(8, classes)
    layers = [convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), head]
    return Classifier(nn.Sequential(*layers), SPEC)


class Tiny(nn.Sequential):
    """Two stages, small enough to learn in a test."""

    def __init__(self, width: int) -> None:
        stages: list[nn.Module] = []
        for few, many, stride in ((3, width, 2), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            stages += [nn.Conv2d(few, many, 3, stride, 1, bias=False), nn.BatchNorm2d(many), nn.ReLU()]
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def tiny(width: int, seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Tiny(width), CIFAR_INPUT)


def taught(T: float, w: float, labelled: bool = True) -> Distillation:
    return distillation(Recipe(teacher_arch="teacher", method=KD(T=T, w=w)), labelled)


def train(
    path: Path,
    npz: Path,
    recipe: Recipe = RECIPE,
    options: Options | None = None,
    loss: Objective | None = None,
    student: Classifier | None = None,
    teacher: Teacher | None = None,
) -> Fitted:
    """With a teacher by KD, where no loss is given, else by CE."""
    data = load_data(str(npz))
    views, tests = prepare(data, recipe, CPU)
    facts = {"data": data.name, "data_digest": data.digest}
    with Run(path, recipe, options or Options(), facts) as run:
        return fit(
            run,
            student=student or small_network(),
            loss=loss or (taught(3.0, 0.8) if teacher else CrossEntropy()),
            data=views,
            teacher=CachedTeacher(views, [LogitCache(teacher, None, Encoding(4))]) if teacher else None,
            tests=tests,
        )


def state(path: Path) -> str:
    """Digest of everything in a checkpoint but the clock's readings."""
    payload = checkpoint.load(path / "last.pt")
    del payload["timings"]
    for record in payload["records"]:
        del record["seconds"], record["images_per_second"]
    return checkpoint.digest(payload)


def teaching(seed: int = 1) -> Teacher:
    return Teacher(small_network(seed=seed))
