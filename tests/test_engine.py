"""The loop: learning rate, updates, NaN, signals, steps, continuing, validation, the teacher."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar10.data import load_data, prepare
from cifar10.models import CIFAR_INPUT, MODELS
from distill import checkpoint, engine, parallel
from distill.answers import AnsweredData
from distill.engine import Fitted, fit
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.logit_store import Encoding
from distill.metrics import Tally
from distill.objectives import CrossEntropy, Distillation, Objective, Step, distillation
from distill.optim import WeightAverage, build_optimizer, learning_rate
from distill.recipe import Options, Recipe
from distill.registry import Classifier, InputSpec
from distill.run_dir import RunDirectory
from distill.stop import SIGNALS, Stopped, StopRequest
from distill.teacher import FLOAT16_MAX, Teacher, agreement, chance_warning, examine
from distill.views import Batch, EvaluationSet, Mixture

ROOT = Path(__file__).resolve().parent.parent
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


def taught(T: float, w: float, labelled: bool = True) -> Distillation:
    return distillation(Recipe(teacher_arch="teacher", T=T, w=w), labelled)


def train(
    path: Path,
    npz: Path,
    recipe: Recipe = RECIPE,
    options: Options | None = None,
    objective: Objective | None = None,
    student: Classifier | None = None,
    teacher: Teacher | None = None,
) -> Fitted:
    """With a teacher by KD, where no objective is given, else by CE."""
    data = load_data(str(npz))
    views, tests = prepare(data, recipe, CPU)
    facts = {"data": data.name, "data_digest": data.digest}
    with RunDirectory(path) as run:
        return fit(
            run,
            recipe,
            options or Options(),
            student=student or small_network(),
            objective=objective or (taught(3.0, 0.8) if teacher else CrossEntropy()),
            data=AnsweredData(views, teacher, None, Encoding(4)) if teacher else views,
            tests=tests,
            facts=facts,
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
    loaded = checkpoint.load_weights(tmp_path / "run" / "last.pt")
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
        train(tmp_path / "clip", small_npz, replace(RECIPE, clip_norm=1.0), objective=BadGradient(), student=student)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    with pytest.raises(Stopped, match="not finite"):
        train(tmp_path / "run", small_npz, objective=BadGradient())
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
    found = evaluate(network, EvaluationSet(images, labels, batch_size=8))
    expected = network.eval()(images)
    assert found.images == 21
    assert torch.equal(found.predictions, expected.argmax(1))
    assert found.accuracy == pytest.approx(100 * (expected.argmax(1) == labels).double().mean().item())
    assert found.loss == pytest.approx(nn.functional.cross_entropy(expected, labels).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- objectives
def test_distillation_is_the_weighted_sum() -> None:
    student = nn.Linear(3, 5)
    batch = Batch(
        torch.randn(6, 3), torch.randint(0, 5, (6,)), torch.arange(6), torch.zeros(6), None, torch.randn(6, 5)
    )
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
    recipe = Recipe(teacher_arch="resnet18", method="dist", batch_size=4, warmup=0)
    monkeypatch.setattr("distill.objectives.world_size", lambda: 2)
    assert distillation(recipe).parts == ("kd", "ce")
    monkeypatch.setattr("distill.objectives.world_size", lambda: 4)
    with pytest.raises(UserError, match="--batch-size 4 is too small for 4 of them"):
        distillation(recipe)


def test_cross_entropy_of_mixed_images() -> None:
    """The same as CE with the two labels as one distribution."""
    logits, labels, others = torch.randn(6, 5), torch.arange(6) % 5, torch.tensor([4, 4, 2, 0, 4, 1])
    share = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    one_hot = nn.functional.one_hot(labels, 5) * share[:, None] + nn.functional.one_hot(others, 5) * (
        1 - share[:, None]
    )
    batch = Batch(logits, labels, labels, labels, Mixture(others, share))
    for smoothing in (0.0, 0.1):
        expected = nn.functional.cross_entropy(logits, one_hot, label_smoothing=smoothing)
        torch.testing.assert_close(CrossEntropy(smoothing)(nn.Identity(), batch).loss, expected)
    step = taught(1.0, 0.0)(nn.Identity(), replace(batch, teacher_logits=torch.zeros(6, 5)))
    torch.testing.assert_close(step.loss, nn.functional.cross_entropy(logits, one_hot))


def test_training_lowers_the_loss_and_beats_chance(small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=30, lr=0.1, augment="none")
    for name, teacher in (("ce", None), ("kd", teaching())):
        fitted = train(tmp_path / name, small_npz, recipe, teacher=teacher)
        assert fitted.records[-1]["train_loss"] < 0.9 * fitted.records[0]["train_loss"]
        assert [r["epoch"] for r in fitted.records] == list(range(1, 31))
    assert {"train_kd", "train_ce", "test_accuracy", "lr"} <= set(fitted.records[0])


# -------------------------------------------------------------------------------------------------------------- teacher
def test_teacher_cannot_move(small_npz: Path, tmp_path: Path) -> None:
    teacher = teaching()
    before = teacher.digest
    train(tmp_path / "run", small_npz, teacher=teacher)
    teacher.check_untouched()
    assert teacher.digest == before
    assert not any(m.training for m in teacher.network.modules())
    assert not any(p.requires_grad for p in teacher.network.parameters())
    batchnorm = teacher.network.network[1]  # type: ignore[index]
    batchnorm.running_mean += 1  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="teacher has changed"):
        teacher.check_untouched()


def test_teacher_answers_are_float16_values() -> None:
    teacher = teaching()
    head: Any = teacher.network.network[6]  # type: ignore[index]
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    answers = teacher.logits(images)
    assert answers.dtype == torch.float32
    assert torch.equal(answers, answers.half().float())
    assert not answers.requires_grad
    head.bias.data.fill_(1e9)
    assert Teacher(teacher.network).logits(images).max() == FLOAT16_MAX


def test_teacher_answers_each_image_by_itself() -> None:
    """Whatever else is asked for, in any order and number: the same bits."""
    for precision in (torch.float32, torch.bfloat16):
        network = small_network()
        network.precision = precision
        teacher = Teacher(network)
        images = torch.randint(0, 256, (150, 32, 32, 3), dtype=torch.uint8)
        whole, order = teacher.logits(images), torch.randperm(150)
        assert torch.equal(teacher.logits(images[order]), whole[order])
        for count in (1, 63, 64, 65):
            assert torch.equal(teacher.logits(images[:count]), whole[:count])


def test_a_teacher_that_sees_the_batch_is_refused() -> None:
    """BatchNorm without running statistics: what it says of an image depends on the others."""
    network = small_network()
    network.network[1] = nn.BatchNorm2d(8, track_running_stats=False)  # type: ignore[operator]
    with pytest.raises(UserError, match="depends on the images beside it"):
        Teacher(network).logits(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_ranks_draw_their_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for number in range(3):
        monkeypatch.setattr(parallel, "rank", lambda number=number: number)
        parallel.seed_generators(3, "cpu")
        drawn.append(torch.rand(3))
    torch.manual_seed(3)
    assert torch.equal(drawn[0], torch.rand(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_generators_of_several_gpus_are_seeded_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU of one process draws numbers of its own; all of them are saved."""
    states: dict[int, int] = {}
    current = [0]

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        current[0] = device.index
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: states.update({current[0]: seed}))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor(states[device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device.index: int(state)}))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: states.update({0: seed}))
    parallel.seed_generators(3, "cuda:0,2")
    assert states.keys() == {0, 2}
    assert states[0] == 3 != states[2]
    saved, before = parallel.generator_states("cuda:0,2"), dict(states)
    assert saved.keys() == {"cpu", "cuda", "cuda1"}
    states.update({0: 7, 2: 8})
    parallel.restore_generators(saved, "cuda:0,2")
    assert states == before


def test_parameters_that_no_image_reaches() -> None:
    """DistributedDataParallel is not to wait for them; the network is as it was."""
    network = Classifier(MODELS.build("efficientnet_b0", 10), CIFAR_INPUT)
    before, drawn = checkpoint.digest(network.state_dict()), torch.get_rng_state()
    idle = parallel.unreached(network)
    assert checkpoint.digest(network.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).sum().backward()
    assert idle
    assert {id(p) for p in idle} == {id(p) for p in network.parameters() if p.grad is None}
    assert parallel.unreached(Classifier(MODELS.build("resnet18", 10), CIFAR_INPUT)) == []


def test_a_second_signal_under_torchrun_is_the_same_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
        assert ended == []
        stop._since -= 31
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [143]


def test_a_teacher_answers_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the network's device, or on those of its process that are named."""
    network = small_network()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setitem(network._buffers, "mean", SimpleNamespace(device=first))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Teacher(network)._devices == [first]
    assert Teacher(network, "cuda")._devices == [first, second]


def test_several_devices_answer_whole_blocks_in_turn() -> None:
    """So that an answer is the same however many there are."""
    one, two = (Teacher(small_network(seed=1), block=8) for _ in range(2))
    two._devices = [CPU, CPU]
    assert (one.at_once, two.at_once) == (8, 16)
    images = torch.randint(0, 256, (29, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(one.logits(images), two.logits(images))
    seen: list[int] = []
    for number, network in enumerate(two._fast):
        network.register_forward_hook(lambda *_, number=number: seen.append(number))
    two.logits(images)
    assert seen == [0, 1, 0, 1]


def test_teacher_is_examined_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = small_network(seed=1)
    network.precision = torch.bfloat16
    teacher = Teacher(network)
    images, labels = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8), torch.zeros(9, dtype=torch.long)
    test = EvaluationSet(images, labels)
    first = examine(teacher, test, "data", tmp_path)
    assert first.precision.keys() == {"precision", "images", "agreement", "error"}
    assert (first.precision["precision"], first.precision["images"]) == ("bfloat16", 9)
    assert 0 < first.precision["error"] < 0.02
    assert first.accuracy == pytest.approx(100 * (first.logits.argmax(1) == 0).double().mean().item())

    class Silent(Teacher):
        def logits(self, _: Tensor) -> Tensor:
            raise AssertionError("asked again")

    assert torch.equal(examine(Silent(network), test, "data", tmp_path).logits, first.logits)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    assert torch.equal(examine(teacher, test, "data", tmp_path).logits, first.logits)
    assert "measuring the teacher again" in capsys.readouterr().out
    other = EvaluationSet(images[:2], labels[:2])
    assert torch.equal(examine(teacher, other, "other data", tmp_path).logits, first.logits[:2])


def test_warning_near_chance() -> None:
    assert chance_warning(92.0, 10) is None
    assert "near chance (10.00 %)" in (chance_warning(12.0, 10) or "")
    assert chance_warning(52.0, 2)
    assert chance_warning(58.0, 2) is None
    assert agreement(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 0, 3])) == 75


# ---------------------------------------------------------------------------------------------- continuing, bit for bit
@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "crop_flip"},
        {"augment": "original"},
        {"mixup": True, "cutout": 9, "augment": "original"},
        {"optimizer": "rmsprop", "lr": 0.001, "accumulate": 2, "schedule": "step", "decay_epochs": 0.5},
        {"optimizer": "adamw", "lr": 0.001, "ema": 0.9, "clip_norm": 1.0, "schedule": "onecycle"},
    ],
    ids=str,
)
def test_cut_anywhere_and_continued(small_npz: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stopped after every single step, in a new process's state each time: the same weights, optimiser and metrics."""
    recipe = replace(RECIPE, **changes)
    train(tmp_path / "whole", small_npz, recipe, teacher=teaching())
    for stop in range(3 * 5 - 1):
        torch.manual_seed(stop)  # what the generators hold before must play no part
        student = small_network(seed=stop and 7)  # nor what the network starts with, once there is a checkpoint
        with pytest.raises(Stopped, match="after 1 steps") as stopped:
            train(tmp_path / "cut", small_npz, recipe, Options(steps=1), None, student, teaching())
        assert stopped.value.exit_code == 0
    train(tmp_path / "cut", small_npz, recipe, Options(steps=1), None, small_network(seed=7), teaching())
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile takes a C++ compiler")
def test_compiled_learns_the_same_and_continues(small_npz: Path, tmp_path: Path) -> None:
    """Dropout, BatchNorm and mode changes in between, compiled: cut and continued bit for bit, near the eager loss."""
    recipe = replace(RECIPE, compile=True, epochs=2)
    whole = train(tmp_path / "whole", small_npz, recipe)
    for steps in (1, 5):
        with pytest.raises(Stopped):
            train(tmp_path / "cut", small_npz, recipe, Options(steps=steps))
    train(tmp_path / "cut", small_npz, recipe)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    eager = train(tmp_path / "eager", small_npz, replace(recipe, compile=False))
    # dropout draws other numbers when compiled
    assert whole.records[-1]["train_loss"] == pytest.approx(eager.records[-1]["train_loss"], rel=0.1)


def test_without_a_compiler(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        train(tmp_path, small_npz, replace(RECIPE, compile=True))


def test_sync_bn_is_refused_where_it_cannot_be(small_npz: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sync-bn takes CUDA"):
        train(tmp_path, small_npz, replace(RECIPE, sync_bn=True))


def test_sync_bn_keeps_the_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that says it is CUDA: converted layers, the same parameters under the same names."""
    network = small_network()
    before = dict(network.network.named_parameters())
    monkeypatch.setitem(network._buffers, "mean", SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.spread(network, network.mean.device, replace(RECIPE, sync_bn=True), "cuda:0") is network
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    after = dict(network.network.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_several_gpus_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel over the devices named; compiling and common BatchNorm statistics take a process for each."""
    found = []
    network = small_network()
    monkeypatch.setitem(network._buffers, "mean", SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel, "DataParallel", lambda module, here: found.append((module, here)) or module)
    parallel.spread(network, network.mean.device, RECIPE, "auto")
    parallel.spread(network, network.mean.device, RECIPE, "cuda:0,0")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert found == [(network, [first, second]), (network, [first, first])]
    for change, message in (({"compile": True}, "--compile takes one GPU"), ({"sync_bn": True}, "--sync-bn takes")):
        with pytest.raises(UserError, match=message):
            parallel.spread(network, network.mean.device, replace(RECIPE, **change), "auto")


def test_tensorboard(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted = train(tmp_path / "run", small_npz, options=Options(tensorboard=True))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("test_accuracy")}
    assert shown == {r["epoch"]: pytest.approx(r["test_accuracy"]) for r in fitted.records}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard: pip install tensorboard"):
        train(tmp_path / "other", small_npz, options=Options(tensorboard=True))


def test_time_between_checkpoints_does_not_matter(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "seldom", small_npz)
    train(tmp_path / "often", small_npz, options=Options(save_minutes=0))
    assert state(tmp_path / "seldom") == state(tmp_path / "often")


def test_seeds(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "a", small_npz)
    for name, recipe in (("seed", replace(RECIPE, seed=1)), ("views", replace(RECIPE, view_seed=1))):
        train(tmp_path / name, small_npz, recipe)
        same = checkpoint.load(tmp_path / "a" / "last.pt")["student"]
        assert checkpoint.digest(same) != checkpoint.digest(checkpoint.load(tmp_path / name / "last.pt")["student"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_at_the_next_step(small_npz: Path, tmp_path: Path, number: signal.Signals) -> None:
    train(tmp_path / "whole", small_npz)

    class Signalling(CrossEntropy):
        steps = 0

        def __call__(self, student: nn.Module, batch: Batch) -> Step:
            type(self).steps += 1
            if self.steps == 7:
                os.kill(os.getpid(), number)
            return super().__call__(student, batch)

    handlers = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(Stopped, match=f"stopped by {number.name} at epoch 2, step 2 of 5") as stop:
        train(tmp_path / "cut", small_npz, objective=Signalling())
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    train(tmp_path / "cut", small_npz)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


@pytest.mark.parametrize("numbers", [("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGINT"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_ends_at_once(numbers: tuple[str, str]) -> None:
    """With and without time between the two; without, two of a kind may arrive as one, as signals do."""
    first, second = (signal.Signals[name] for name in numbers)
    for pause in (0.1, 0):
        code = f"""if True:
            import os, time
            from distill.stop import StopRequest
            with StopRequest() as stop:
                os.kill(os.getpid(), {int(first)}); time.sleep({pause}); os.kill(os.getpid(), {int(second)})
                time.sleep(5)
            """
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert found.returncode in (128 + first, 128 + second)
        assert found.stderr == ""


def test_signal_during_evaluation(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", small_npz)
    monkeypatch.setattr(engine, "evaluate", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*a))[1])
    with pytest.raises(Stopped, match="at epoch 1, step 5 of 5"):
        train(tmp_path / "cut", small_npz)
    monkeypatch.undo()
    train(tmp_path / "cut", small_npz)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


def test_damaged_last_checkpoint_falls_back(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "whole", small_npz)
    with pytest.raises(Stopped):
        train(tmp_path / "cut", small_npz, options=Options(steps=12))
    (tmp_path / "cut" / "last.pt").write_bytes(b"PK damaged")
    train(tmp_path / "cut", small_npz)
    assert "continuing from previous.pt" in capsys.readouterr().err
    assert state(tmp_path / "cut") == state(tmp_path / "whole")


def test_resume_starts_a_run_from_a_named_checkpoint(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", small_npz)
    with pytest.raises(Stopped):
        train(tmp_path / "part", small_npz, options=Options(steps=7))
    named = str(tmp_path / "part" / "last.pt")
    with pytest.raises(Stopped, match="at epoch 3, step 0"):
        train(tmp_path / "again", small_npz, options=Options(resume=named, steps=3))
    # The same command continues from the run's own checkpoint, or a preempted job would never end.
    with pytest.raises(Stopped, match="at epoch 3, step 3"):
        train(tmp_path / "again", small_npz, options=Options(resume=named, steps=3))
    train(tmp_path / "again", small_npz, options=Options(resume=named))
    assert state(tmp_path / "again") == state(tmp_path / "whole")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "again" / name).write_bytes(b"damaged")
    train(tmp_path / "again", small_npz, options=Options(resume=named))
    assert state(tmp_path / "again") == state(tmp_path / "whole")
    with pytest.raises(UserError, match=r"is of another run: --lr was 0\.05, is 0\.1"):
        train(tmp_path / "other", small_npz, replace(RECIPE, lr=0.1), Options(resume=named))
    with pytest.raises(UserError, match="No such file"):
        train(tmp_path / "whole", small_npz, options=Options(resume=str(tmp_path / "nothing.pt")))


ABSURD: list[dict[str, Any]] = [
    {"epoch": -1},
    {"epoch": 99},
    {"epoch": "two"},
    {"step": -3},
    {"step": 10**9},
    {"records": []},
    {"optimizer": {}},
    {"ranks": [{"generators": {}, "tally": torch.zeros(4)}]},
    {"ranks": []},
    {"student": {"x": torch.zeros(1)}},
    {"ranks": [{"generators": {"cpu": torch.zeros(3)}, "tally": torch.zeros(4)}]},
    {"recipe": [1]},
    {"facts": 3},
]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_state(small_npz: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    train(tmp_path / "run", small_npz)
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "absurd.pt", payload | change)
    with pytest.raises(checkpoint.CheckpointError, match=r"absurd\.pt"):
        train(tmp_path / "other", small_npz, options=Options(resume=str(tmp_path / "absurd.pt")))


def test_extend(small_npz: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", small_npz)
    fitted = train(tmp_path / "run", small_npz, replace(RECIPE, epochs=4), Options(extend=True))
    assert [r["epoch"] for r in fitted.records] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------------ NaN
class Poisoned(CrossEntropy):
    """The loss of step `at` is not finite."""

    at, steps = 7, 0

    def __call__(self, student: nn.Module, batch: Batch) -> Step:
        step = super().__call__(student, batch)
        Poisoned.steps += 1
        return Step(step.logits, step.loss * (float("nan") if self.steps == self.at else 1), ())


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_no_update_is_made_from_a_loss_that_is_not_finite(optimizer: str, small_npz: Path, tmp_path: Path) -> None:
    Poisoned.steps = 0
    student = small_network()
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.001)
    with pytest.raises(
        Stopped, match=r"the loss or its gradient is not finite at step 6 \(lr 0\.0.*last good checkpoint is"
    ) as stop:
        train(tmp_path / "run", small_npz, recipe, objective=Poisoned(), student=student)
    assert stop.value.exit_code == 1
    assert all(torch.isfinite(p).all() for p in student.parameters())
    payload = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (payload["epoch"], payload["step"]) == (1, 0)
    assert all(torch.isfinite(v).all() for v in payload["student"].values())


def test_the_flag_on_the_device_blocks_updates_without_being_read(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where the flag is read every 50 steps: nothing moves between the bad step and the look."""
    Poisoned.steps = 0
    student, moved = small_network(), []
    monkeypatch.setattr(engine.Trainer, "_check_finite", lambda _: None)
    step = engine.Trainer.train_step

    def watched(self: engine.Trainer, batch: Batch) -> None:
        before = [p.detach().clone() for p in student.parameters()]
        step(self, batch)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)))

    monkeypatch.setattr(engine.Trainer, "train_step", watched)
    train(tmp_path / "run", small_npz, objective=Poisoned(), student=student)
    assert moved == [True] * 6 + [False] * 9


def test_weights_that_are_not_finite_are_not_saved(small_npz: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="not finite at step"):
        train(tmp_path / "run", small_npz, replace(RECIPE, lr=1e30, warmup=0))
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(torch.isfinite(v).all() for v in checkpoint.load(path)["student"].values())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory(small_npz: Path, tmp_path: Path, error: Exception) -> None:
    class Hungry(Poisoned):
        def __call__(self, student: nn.Module, batch: Batch) -> Step:
            if Poisoned.steps == 6:
                raise error
            return super().__call__(student, batch)

    Poisoned.steps = 0
    with pytest.raises(Stopped, match="out of memory with --batch-size 8; try 4") as stop:
        train(tmp_path / "run", small_npz, objective=Hungry())
    assert stop.value.exit_code == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_running_statistics_that_are_not_finite_are_not_saved(small_npz: Path, tmp_path: Path) -> None:
    student = small_network()
    student.network[1].running_var.fill_(math.inf)  # type: ignore[index, operator, union-attr]
    with pytest.raises(Stopped, match="a weight is not finite"):
        train(tmp_path / "run", small_npz, replace(RECIPE, val_split=8), student=student)
    assert not list((tmp_path / "run").glob("*.pt"))


# ----------------------------------------------------------------------------------------------------------- validation
def test_validation_part_chooses_the_best_epoch(small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=6, val_split=8)
    fitted = train(tmp_path / "run", small_npz, recipe)
    accuracies = [r["val_accuracy"] for r in fitted.records]
    best = fitted.to_dict()["best_epoch"]
    assert best["val_accuracy"] == max(accuracies)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    kept = checkpoint.load(tmp_path / "run" / "best.pt")
    assert kept["epoch"] == best["epoch"]
    train(tmp_path / "without", small_npz)
    assert not (tmp_path / "without" / "best.pt").exists()


def test_held_out_images_are_not_trained_on(small_npz: Path) -> None:
    data = load_data(str(small_npz))
    views, tests = prepare(data, replace(RECIPE, val_split=8), CPU)
    trained = {i for epoch in range(5) for batch in views.batches(epoch) for i in batch.indices.tolist()}
    held_out = {i for i in range(40) if any(torch.equal(data.train_images[i], x) for x in tests["val"].images)}
    assert len(tests["val"].labels) == 8
    assert not trained & held_out


def test_nothing_grows(small_npz: Path, tmp_path: Path) -> None:
    """2,000 steps and 50 saves: open files and memory stay as they are."""
    resource: Any = pytest.importorskip("resource")
    train(tmp_path / "warm", small_npz)
    files = len(os.listdir("/proc/self/fd"))
    recipe, growth = replace(RECIPE, epochs=25, batch_size=2), []
    for k in range(4):
        train(tmp_path / str(k), small_npz, recipe)
        growth.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(os.listdir("/proc/self/fd")) == files
    assert growth[-1] - growth[0] < 20_000  # KiB, over 1,500 further steps


def test_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPE.lr = 1.0  # type: ignore[misc]


def test_tensors_stay_where_the_student_is() -> None:
    """No host copy in a step: what the objective gets lies on the device of the images."""
    images, logits = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, 4)
    batch = Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.zeros(4), None, logits)
    seen: list[Tensor] = []
    student = small_network()
    student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    taught(1.0, 0.5)(student, batch)
    assert seen[0] is images
