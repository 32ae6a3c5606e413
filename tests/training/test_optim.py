"""Learning rate, optimisers, the average of the weights, counting, and what one step minimises."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar10.data import load_data, prepare
from distill.config.recipe import Options, Recipe
from distill.data.datasets import Batch, Mixture, TensorTestData
from distill.errors import UserError
from distill.files import checkpoint
from distill.losses.dist import DIST
from distill.models import weights
from distill.models.classifier import Classifier
from distill.parallel.devices import images_at_once
from distill.training.evaluation import evaluate
from distill.training.metrics import Tally
from distill.training.objectives import CrossEntropy, Step, check_loss
from distill.training.optim import WeightAverage, build_optimizer, learning_rate
from distill.training.stop import Diverged, Stopped
from tests.runs import CPU, RECIPE, small_network, taught, teaching, train


# --------------------------------------------------------------------------------------------------------- optimisation
def test_learning_rate() -> None:
    recipe = Recipe(epochs=10, lr=1.0, warmup=2)
    rates = [learning_rate(step, recipe, 10) for step in range(100)]
    assert rates[:20] == pytest.approx([(k + 1) / 20 for k in range(20)])
    assert rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[99] == pytest.approx((1 + math.cos(math.pi * 79 / 80)) / 2)
    steps = replace(recipe, schedule="multistep", warmup=0)
    assert [learning_rate(s, steps, 10) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    tenths = replace(recipe, schedule="step", warmup=0, decay_epochs=2.4, decay_rate=0.5)
    assert [learning_rate(s, tenths, 10) for s in (0, 23, 24, 47, 48, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.0625]
    restarts = replace(recipe, epochs=25, schedule="restarts", warmup=0)
    assert [learning_rate(s, restarts, 10) for s in (0, 50, 99, 100, 150, 249)] == pytest.approx(
        [1, 0.5, (1 + math.cos(math.pi * 0.99)) / 2, 1, 0.5, (1 + math.cos(math.pi * 0.49)) / 2]
    )
    assert learning_rate(99, replace(recipe, schedule="constant"), 10) == 1.0
    assert learning_rate(0, replace(recipe, epochs=1, warmup=5), 4) == 1.0  # a quarter of the run: one step of four


@pytest.mark.parametrize("total", [10, 100, 1000])
def test_onecycle_is_torchs(total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=total, cycle_momentum=False)
    recipe = Recipe(epochs=10, lr=0.5, schedule="onecycle")
    for step in range(total):
        assert learning_rate(step, recipe, total // 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step() if step < total - 1 else None


def test_adamw_is_torchs_and_can_be_held_back() -> None:
    network, other = small_network(), small_network()
    optimizer = build_optimizer(network, replace(RECIPE, optimizer="adamw", weight_decay=0.1))
    weights = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=RECIPE.lr)
    for _ in range(3):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        theirs.step()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in network.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_rmsprop_is_torchs_with_efficientnets_settings() -> None:
    network, other = small_network(), small_network()
    optimizer = build_optimizer(network, replace(RECIPE, optimizer="rmsprop", weight_decay=0.0))
    theirs = torch.optim.RMSprop(other.parameters(), lr=RECIPE.lr, alpha=0.9, eps=math.sqrt(0.001), momentum=0.9)
    for _ in range(3):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        theirs.step()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_accumulated_parts_have_the_gradient_of_the_whole(small_npz: Path, tmp_path: Path) -> None:
    """Without BatchNorm's statistics, which are those of a part: one step, then the same weights; the tally too."""
    found = []
    for parts in (1, 4):
        student = small_network()
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda _mode=True, module=module: nn.Module.train(module, False)  # type: ignore[method-assign]
        recipe = replace(RECIPE, accumulate=parts, mixup=True, epochs=1)
        fitted = train(tmp_path / str(parts), small_npz, recipe, student=student, teacher=teaching())
        found.append((student.state_dict(), fitted.records[0]))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, rtol=1e-4, atol=1e-5)
    assert found[1][1]["train_loss"] == pytest.approx(found[0][1]["train_loss"], rel=1e-4)
    with pytest.raises(UserError, match="--batch-size 8 must be a multiple of the 1 processes times 3 parts"):
        train(tmp_path / "3", small_npz, replace(RECIPE, accumulate=3))


def test_weight_average_is_the_formula() -> None:
    """Of weights and BatchNorm statistics, with a warm-up; counters are copied."""
    network = small_network()
    average = WeightAverage(network, 0.5)
    expected = {k: v.clone() for k, v in network.state_dict().items()}
    for step in range(20):
        for value in network.state_dict().values():
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            expected[key] = keep * expected[key] + (1 - keep) * value if value.is_floating_point() else value.clone()
    for key, value in average.network.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not any(p.requires_grad for p in average.network.parameters())


def test_the_average_is_what_counts(small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=4, ema=0.9, val_split=8)
    fitted = train(tmp_path / "run", small_npz, recipe)
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    assert checkpoint.digest(payload["average"]) != checkpoint.digest(payload["student"])
    test = prepare(load_data(str(small_npz)), recipe, CPU)[1]["test"]
    for key, name in (("average", "test"), ("student", "raw_test")):
        network = small_network()
        network.network.load_state_dict(payload[key])
        assert evaluate(network, test).loss == fitted.records[-1][f"{name}_loss"]
    assert fitted.test.loss == fitted.records[-1]["test_loss"]
    assert fitted.to_dict()["raw_test_accuracy"] == fitted.records[-1]["raw_test_accuracy"]
    loaded = weights.load(tmp_path / "run" / "last.pt").state
    assert checkpoint.digest(loaded) == checkpoint.digest(payload["average"])


def test_clipped_gradient(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    train(tmp_path / "run", small_npz, replace(RECIPE, clip_norm=0.01))
    assert norms == pytest.approx([0.01] * 15, rel=1e-3)


class BadGradient(CrossEntropy):
    """A finite loss whose gradient is infinite."""

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        step = super().__call__(student, batch)
        return Step(step.logits, step.loss + (step.logits.sum() * 0).sqrt(), ())


def test_a_gradient_that_is_not_finite(small_npz: Path, tmp_path: Path) -> None:
    """Clipping measures the gradient's norm, so that it blocks the update; otherwise nothing of it is saved."""
    student = small_network()
    with pytest.raises(Stopped, match="the loss or its gradient is not finite at step 0"):
        train(tmp_path / "clip", small_npz, replace(RECIPE, clip_norm=1.0), loss=BadGradient(), student=student)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    with pytest.raises(Diverged, match="not finite") as error:
        train(tmp_path / "run", small_npz, loss=BadGradient())
    assert error.value.step == 1  # the gradient of step 0 has made weights of it
    assert not list(tmp_path.rglob("*.pt"))


def test_weight_decay_spares_batchnorm_and_biases() -> None:
    network = small_network()
    decayed = {id(p) for g in build_optimizer(network, RECIPE).param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in network.parameters() if p.dim() > 1}
    groups = build_optimizer(network, replace(RECIPE, decay_all=True)).param_groups
    assert [len(g["params"]) for g in groups] == [len(list(network.parameters()))]


def test_optimizer_is_sgd_with_nesterov() -> None:
    """One step by hand: v = g + wd * p, p -= lr * (v + momentum * v) for the first step."""
    network = small_network()
    recipe = replace(RECIPE, weight_decay=0.01, momentum=0.9)
    optimizer = build_optimizer(network, recipe)
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip(network.parameters(), before, strict=True):
        assert p.grad is not None
        gradient = p.grad + (0.01 * old if p.dim() > 1 else 0)
        torch.testing.assert_close(p.detach(), old - recipe.lr * 1.9 * gradient)


def test_tally_counts_like_a_loop() -> None:
    tally, logits, labels = Tally(CPU, ("kd",)), torch.randn(20, 10), torch.randint(0, 10, (20,))
    for part in (slice(0, 8), slice(8, 20)):
        loss = nn.functional.cross_entropy(logits[part], labels[part])
        tally.add(logits[part], labels[part], loss, (2 * loss,))
    found, order = tally.summary(), logits.argsort(1, descending=True)
    assert found["images"] == 20
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["kd"] == pytest.approx(2 * found["loss"])
    assert found["accuracy"] == pytest.approx(5 * (order[:, 0] == labels).sum().item())
    assert found["top5"] == pytest.approx(5 * (order[:, :5] == labels[:, None]).sum().item())


def test_evaluation_sees_each_image_once() -> None:
    network, images = small_network(), torch.randint(0, 256, (21, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 4, (21,))
    found = evaluate(network, TensorTestData(images, labels, batch_size=8))
    expected = network.eval()(images)
    assert found.images == 21
    assert torch.equal(found.predictions, expected.argmax(1))
    assert found.accuracy == pytest.approx(100 * (expected.argmax(1) == labels).double().mean().item())
    assert found.loss == pytest.approx(nn.functional.cross_entropy(expected, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()]
)
def test_evaluation_takes_as_many_images_as_the_memory_holds(error: Exception) -> None:
    class Large(Classifier):
        most = 0

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.most:
                raise error
            return super().forward(images)

    plain = small_network()
    images, labels = torch.randint(0, 256, (21, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 4, (21,))
    test, expected = TensorTestData(images, labels, batch_size=8), None
    network = Large(plain.network, plain.spec)
    for network.most in (21, 3, 1):
        found = evaluate(network, test)
        expected = expected or found
        assert torch.equal(found.predictions, expected.predictions)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    network.most = 0
    with pytest.raises(type(error)):
        evaluate(network, test)


def test_fewer_large_images_at_once() -> None:
    assert [images_at_once(512, size) for size in (32, 224, 225, 320, 448, 4096)] == [512, 512, 256, 128, 128, 16]


# ----------------------------------------------------------------------------------------------------------- objectives
def test_distillation_is_the_weighted_sum() -> None:
    student = nn.Linear(3, 5)
    batch = Batch(torch.randn(6, 3), torch.randint(0, 5, (6,)), torch.arange(6), None, torch.randn(6, 5))
    step = taught(3.0, 0.8)(student, batch)
    soft, hard = step.parts
    torch.testing.assert_close(step.loss.detach(), 0.8 * soft + 0.2 * hard)
    torch.testing.assert_close(hard, nn.functional.cross_entropy(student(batch.images), batch.labels).detach())
    alone = taught(3.0, 0.0)(student, batch)
    torch.testing.assert_close(alone.loss, CrossEntropy()(student, batch).loss)
    alone = taught(3.0, 1.0, labelled=False)(student, batch)
    torch.testing.assert_close(alone.loss.detach(), soft)
    with pytest.raises(ValueError, match="w = 1"):
        taught(3.0, 0.9, labelled=False)


def test_dist_wants_two_images_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(teacher_arch="resnet18", method=DIST(), batch_size=4, warmup=0)
    monkeypatch.setattr("distill.training.objectives.world_size", lambda: 2)
    check_loss(recipe, labelled=True)
    monkeypatch.setattr("distill.training.objectives.world_size", lambda: 4)
    with pytest.raises(UserError, match="--batch-size 4 is too small for 4 of them"):
        check_loss(recipe, labelled=True)


def test_cross_entropy_of_mixed_images() -> None:
    """The same as CE with the two labels as one distribution."""
    logits, labels, others = torch.randn(6, 5), torch.arange(6) % 5, torch.tensor([4, 4, 2, 0, 4, 1])
    share = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    one_hot = nn.functional.one_hot(labels, 5) * share[:, None] + nn.functional.one_hot(others, 5) * (
        1 - share[:, None]
    )
    batch = Batch(logits, labels, labels, Mixture(others, share))
    for smoothing in (0.0, 0.1):
        expected = nn.functional.cross_entropy(logits, one_hot, label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(smoothing)(nn.Identity(), batch).loss, expected)
    step = taught(1.0, 0.0)(nn.Identity(), replace(batch, teacher_logits=torch.zeros(6, 5)))
    torch.testing.assert_close(step.loss, nn.functional.cross_entropy(logits, one_hot))


def test_the_first_epochs_are_of_smaller_images(small_npz: Path, tmp_path: Path) -> None:
    """In training alone: what is evaluated has the network's own size in every epoch."""
    student, seen = small_network(), []
    student.network.register_forward_pre_hook(lambda module, given: seen.append((module.training, given[0].shape[-1])))
    train(tmp_path, small_npz, replace(RECIPE, sizes="16:1,24:1"), student=student)
    order = list(dict.fromkeys(seen))
    assert order.pop(0) == (False, 16)  # a copy on trial, before the first step
    assert order == [(True, 16), (False, 32), (True, 24), (True, 32)]
    assert seen.count((True, 16)) == seen.count((True, 24)) == 5


@pytest.mark.parametrize("sizes", ["16", "16:", "x:2", "16:0", "4:2", "16:2;24:2", "16:3"])
def test_sizes_that_are_none(sizes: str) -> None:
    with pytest.raises(UserError, match="--sizes"):
        replace(RECIPE, sizes=sizes)


def test_biases_of_batch_norm_learn_at_their_own_rate(small_npz: Path, tmp_path: Path) -> None:
    network = small_network()
    optimizer = build_optimizer(network, replace(RECIPE, bias_lr=8.0, weight_decay=0.1))
    fast = [group for group in optimizer.param_groups if group.get("lr_factor") == 8]
    assert [id(p) for group in fast for p in group["params"]] == [id(network.network[1].bias)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    everything = build_optimizer(network, replace(RECIPE, bias_lr=8.0, weight_decay=0.1, decay_all=True))
    assert [group["weight_decay"] for group in everything.param_groups] == [0.1, 0.1 / 8]  # times the rate: the same
    found = []
    for factor in (1.0, 2.0):  # without momentum the first step moves by rate times gradient
        moved = small_network()
        recipe = replace(RECIPE, bias_lr=factor, momentum=0.0, warmup=0)
        with pytest.raises(Stopped):
            train(tmp_path / str(factor), small_npz, recipe, Options(steps=1), student=moved)
        found.append(
            [p.detach() - q.detach() for p, q in zip(moved.parameters(), small_network().parameters(), strict=True)]
        )
    for (name, _), one, two in zip(network.network.named_parameters(), *found, strict=True):
        torch.testing.assert_close(two, one * (2 if name == "1.bias" else 1))


def test_training_lowers_the_loss_and_beats_chance(small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=30, lr=0.1, augment="none")
    for name, teacher in (("ce", None), ("kd", teaching())):
        fitted = train(tmp_path / name, small_npz, recipe, teacher=teacher)
        assert fitted.records[-1]["train_loss"] < 0.9 * fitted.records[0]["train_loss"]
        assert [r["epoch"] for r in fitted.records] == list(range(1, 31))
    assert {"train_kd", "train_ce", "test_accuracy", "lr"} <= set(fitted.records[0])
