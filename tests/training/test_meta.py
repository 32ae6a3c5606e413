"""A training step never waits for the device: it runs on torch's meta device, which has no data to wait for."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar10.data import load_data, prepare
from cifar10.models import CIFAR_INPUT, MODELS
from distill.config.recipe import Options, Recipe
from distill.data.datasets import Batch, TensorData
from distill.losses.kd_loss import KD
from distill.models.classifier import Classifier
from distill.run.run import Run
from distill.teacher.cached import CachedTeacher, LogitCache
from distill.teacher.store import LogitStore
from distill.teacher.teacher import Teacher
from distill.training.engine import Trainer
from distill.training.objectives import CrossEntropy, FeatureDistillation, Objective, Step, build_loss
from tests.runs import CPU, small_network

META = torch.device("meta")
RECIPE = Recipe(batch_size=8)
TAUGHT = replace(RECIPE, teacher_arch="resnet18", method=KD())


class OnMeta(TorchDispatchMode):
    """Raises for an operation that reads or makes a tensor on another device than `meta`."""

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kernel = function is not torch.ops.aten._fused_sgd_.default  # the only one that torch lacks for the meta device
        result = function(*args, **(kwargs or {})) if kernel else None
        if function is torch.ops.aten.slice.Tensor:  # the images' numbers, which stay on the CPU, in micro-batches
            return result
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.device == META, f"{function}: a tensor on {value.device}"
        return result


@pytest.fixture(autouse=True)
def _meta_like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets fused optimisers and autocast pass their check of the device, which knows real ones alone."""
    module, autocast = sys.modules["torch.optim.optimizer"], torch.autocast
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cuda", "cpu", "meta"])
    monkeypatch.setattr(torch, "autocast", lambda kind, **to: nullcontext() if kind == "meta" else autocast(kind, **to))


def images(npz: Path, recipe: Recipe = RECIPE) -> TensorData:
    return prepare(load_data(str(npz)), recipe, CPU)[0]


def train_step(
    path: Path, data: TensorData, recipe: Recipe, student: Classifier, loss: Objective, teacher: Any = None
) -> None:
    """The second step of a run, which is none at which it looks whether the loss is finite."""
    data.images, data.labels, data.device = data.images.to(META), data.labels.to(META), META
    trainer = Trainer(Run(path, recipe, Options()), student, loss, data, teacher)
    trainer.model.train(None)
    trainer.state.step = 1
    batch = next((teacher or data).batches(0, 1))
    with OnMeta():
        trainer.train_step(batch)
    assert all(parameter.grad is not None for parameter in trainer.model.module.parameters())


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"clip_norm": 1.0}, {"accumulate": 2}, {"optimizer": "adamw", "mixup": True, "cutout": 8}],
    ids=str,
)
def test_cross_entropy(changes: dict[str, Any], small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, **changes)
    train_step(tmp_path, images(small_npz, recipe), recipe, small_network().to(META), CrossEntropy(0.1))


@pytest.mark.parametrize(("method", "top_k"), [("kd", 0), ("dkd", 0), ("dist", 0), ("nkd", 0), ("kd", 2)])
def test_cached_logits(method: str, top_k: int, small_npz: Path, tmp_path: Path) -> None:
    recipe = TAUGHT.with_flags({"method": method, "top_k": top_k})
    data, teacher, student = images(small_npz, recipe), Teacher(small_network(seed=1)), small_network()
    key = {"teacher": "small", "images": data.image_count, "classes": 4, "top_k": top_k}
    store = LogitStore(tmp_path / "stores", key)
    list(CachedTeacher(data, [LogitCache(teacher, store, store.encoding)]).fill(0))
    loss = build_loss(recipe, student, teacher, data)
    cache = LogitCache(teacher, store, store.encoding)
    train_step(tmp_path, data, recipe, student.to(META), loss, CachedTeacher(data, [cache]))
    assert (cache.misses, cache.hits) == (0, 8 * 4)


def test_features(small_npz: Path, tmp_path: Path) -> None:
    recipe = TAUGHT.with_flags({"method": "none", "overhaul": True, "clip_norm": 1.0})
    data = images(small_npz)
    student, teacher = (Classifier(MODELS.build(arch, 4), CIFAR_INPUT) for arch in ("mobilenetv2", "resnet18"))
    loss = build_loss(recipe, student, Teacher(teacher), data)
    assert isinstance(loss, FeatureDistillation)
    loss.features.margins = [limit.to(META) for limit in loss.features.margins if limit is not None]
    loss.model.to(META), teacher.to(META)
    train_step(tmp_path, data, recipe, student, loss)


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.cpu, bool, lambda loss: loss + torch.zeros(())])
def test_a_wait_is_seen(wait: Callable[[Tensor], Any], small_npz: Path, tmp_path: Path) -> None:
    class Waiting(CrossEntropy):
        def __call__(self, student: nn.Module, batch: Batch) -> Step:
            step = super().__call__(student, batch)
            with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):  # the type is torch's choice
                wait(step.loss)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_step(tmp_path, images(small_npz), RECIPE, small_network().to(META), Waiting())
