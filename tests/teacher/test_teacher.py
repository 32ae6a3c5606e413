"""The teacher: it does not move, its answers depend on the one image, and what it knows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.datasets import TensorTestData, spread
from distill.errors import UserError
from distill.teacher import report
from distill.teacher.report import agreement, examine, near_chance
from distill.teacher.teacher import FLOAT16_MAX, Teacher
from tests.runs import CPU, small_network, teaching, train


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


def test_a_teacher_takes_as_many_images_as_fit(capsys: pytest.CaptureFixture[str]) -> None:
    class Small(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 8:
                raise RuntimeError("CUDA out of memory")
            return super().forward(images)  # type: ignore[no-any-return]

    network = small_network(seed=1)
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    expected = Teacher(network, block=8).logits(images)
    network.network = Small(*network.network.children())
    teacher = Teacher(network, block=32)
    assert torch.allclose(teacher.logits(images), expected, rtol=1e-3)
    assert teacher.block == 8
    assert "teacher: 16 images at once are more than the memory holds: 8 it is" in capsys.readouterr().out


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


@pytest.mark.parametrize(("total", "count"), [(100, 24), (97, 24), (20, 24), (24, 24)])
def test_some_test_images_are_spread_evenly(total: int, count: int) -> None:
    numbers = torch.arange(total)
    test = TensorTestData(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3), numbers, batch_size=7)
    places, images, labels = zip(*spread(test, count), strict=True)
    chosen = torch.cat([numbers[part] for part in places])
    assert torch.equal(torch.cat(images)[:, 0, 0, 0].long(), chosen)
    assert torch.equal(torch.cat(labels), chosen)
    assert len(chosen.unique()) == len(chosen)
    if total <= count:
        assert torch.equal(chosen, numbers)
    else:
        assert abs(len(chosen) - count) <= 3
        assert chosen.diff().max() <= total / 3


def test_teacher_is_compared_on_images_that_are_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "COMPARED", 16)
    network = small_network(seed=1)
    network.precision = torch.bfloat16
    teacher = Teacher(network)
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = examine(teacher, TensorTestData(images, torch.zeros(64, dtype=torch.long)), "data", tmp_path)
    some = torch.cat([images[:8], images[32:40]])
    rounded = teacher.logits(some)
    network.precision = torch.float32
    error = (rounded - network(some)).abs().mean().item()
    assert found.precision["images"] == 16
    assert found.precision["error"] == pytest.approx(error, rel=1e-4)


def test_teacher_is_examined_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = small_network(seed=1)
    network.precision = torch.bfloat16
    teacher = Teacher(network)
    images, labels = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8), torch.zeros(9, dtype=torch.long)
    test = TensorTestData(images, labels)
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
    other = TensorTestData(images[:2], labels[:2])
    assert torch.equal(examine(teacher, other, "other data", tmp_path).logits, first.logits[:2])


def test_warning_near_chance() -> None:
    assert near_chance(12.0, 10)
    assert not near_chance(92.0, 10)
    assert near_chance(52.0, 2)
    assert not near_chance(58.0, 2)
    assert agreement(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 0, 3])) == 75
