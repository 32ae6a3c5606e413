"""The teacher's answers on disk: each view answered once, never a wrong logit, whatever happens to the files."""

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cifar10 import train_kd
from cifar10.data import load_data, prepare
from distill.config.recipe import Options, Recipe
from distill.data.datasets import TensorData
from distill.errors import UserError
from distill.files import checkpoint
from distill.losses.top_k import TopKLogits, top_k_logits
from distill.teacher import cached
from distill.teacher import store as logit_store
from distill.teacher.cached import CachedTeacher, LogitCache
from distill.teacher.store import Encoding, LogitStore, fits, store_key
from distill.teacher.teacher import Teacher
from tests.cifar10.test_train import KD
from tests.conftest import teacher_file
from tests.runs import small_network

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3, batch_size=8, views=2)


def training(npz: Path, recipe: Recipe = RECIPE) -> TensorData:
    return prepare(load_data(str(npz)), recipe, CPU)[0]


def store_of(root: Path, npz: Path, recipe: Recipe = RECIPE, seed: int = 1) -> tuple[TensorData, Teacher, LogitStore]:
    data, teacher = training(npz, recipe), Teacher(small_network(seed=seed))
    key = store_key(
        data, teacher, teacher_arch="small", name="small", digest="d", classes=4, view_seed=recipe.view_seed
    )
    return data, teacher, LogitStore(root, key)


def answering(data: TensorData, teacher: Teacher, store: LogitStore | None, top_k: int = 0) -> CachedTeacher:
    return CachedTeacher(data, [LogitCache(teacher, store, store.encoding if store else Encoding(4, top_k))])


def answers(data: CachedTeacher, epochs: int = 3) -> list[tuple[list[int], torch.Tensor]]:
    found = []
    for epoch in range(epochs):
        for batch in data.batches(epoch):
            assert batch.teacher_logits is not None
            found.append((batch.indices.tolist(), batch.teacher_logits))
    return found


def same(one: list[Any], two: list[Any]) -> bool:
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    "change", [{}, {"mixup": True}, {"augment": "original", "cutout": 8}, {"val_split": 9}], ids=str
)
def test_stored_or_not_full_or_empty_the_same_answers(small_npz: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Step by step equal to the teacher's own answers to the very images of the batch; a full store asks nothing."""
    recipe = replace(RECIPE, **change)
    data, teacher, store = store_of(tmp_path, small_npz, recipe)
    none, empty = answering(data, teacher, None), answering(data, teacher, store)
    expected = answers(none)
    assert same(answers(empty), expected)
    # the store gets two views of all images, also of those that an epoch leaves out
    assert (none.caches[0].misses, empty.caches[0].misses) == (3 * data.steps_per_epoch * 8, 2 * len(data.plan.indices))
    full = answering(data, teacher, store)
    assert same(answers(full), expected)
    assert full.caches[0].misses == 0
    for epoch in range(3):
        for batch in full.batches(epoch):
            assert batch.teacher_logits is not None
            assert torch.equal(batch.teacher_logits, teacher.logits(batch.images))


def test_cut_anywhere_the_same_answers_and_none_twice(small_npz: Path, tmp_path: Path) -> None:
    data, teacher, store = store_of(tmp_path, small_npz)
    expected = answers(answering(data, teacher, None), 1)
    asked = 0
    for first in range(data.steps_per_epoch):
        cut = answering(data, teacher, store)
        batches = cut.batches(0, first)
        found = next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert torch.equal(found.teacher_logits, expected[first][1])  # type: ignore[arg-type]
        asked += cut.caches[0].misses
    assert asked == data.steps_per_epoch * 8
    assert store.coverage() == {0: 40}


def test_another_order_finds_what_an_epoch_left_out(small_npz: Path, tmp_path: Path) -> None:
    """40 images in batches of 16: eight are left out, others for each seed; two processes share them."""
    recipe = replace(RECIPE, batch_size=16)
    data, teacher, store = store_of(tmp_path, small_npz, recipe)
    shared = [
        TensorData(data.images, data.labels, replace(data.plan, rank=r, world_size=2), data.policy) for r in (0, 1)
    ]
    for part in shared:
        one = answering(part, teacher, store)
        answers(one, 2)
        assert one.caches[0].misses == 2 * 20
    assert store.coverage() == {0: 40, 1: 40}
    other = answering(training(small_npz, replace(recipe, seed=7)), teacher, store)
    expected = answers(answering(training(small_npz, replace(recipe, seed=7)), teacher, None))
    assert same(answers(other), expected)
    assert other.caches[0].misses == 0


def test_two_runs_fill_one_store_at_once(small_npz: Path, tmp_path: Path) -> None:
    """Interleaved step by step, in other orders: each keeps its own answers, a third has to ask for none."""
    data, teacher, store = store_of(tmp_path, small_npz)
    other = training(small_npz, replace(RECIPE, seed=7))
    expected = answers(answering(data, teacher, None), 1)
    pairs = zip(answering(data, teacher, store).batches(0), answering(other, teacher, store).batches(0), strict=True)
    for (mine, theirs), (_, logits) in zip(list(pairs), expected, strict=True):
        assert torch.equal(mine.teacher_logits, logits)  # type: ignore[arg-type]
        assert torch.equal(theirs.teacher_logits, teacher.logits(theirs.images))  # type: ignore[arg-type]
    third = answering(data, teacher, store)
    assert same(answers(third, 1), expected)
    assert third.caches[0].misses == 0


def segments(store: LogitStore) -> list[Path]:
    return sorted(store.path.glob("[0-9]*.pt"))


def test_damage_is_named_and_answered_again(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit, a truncation, an empty file, a file of another store, of another slot, of absurd content."""
    data, teacher, store = store_of(tmp_path, small_npz)
    expected = answers(answering(data, teacher, store))
    foreign_data, foreign_teacher, foreign = store_of(tmp_path, small_npz, seed=2)
    answers(answering(foreign_data, foreign_teacher, foreign))
    assert foreign.path != store.path
    (first,) = (path for path in segments(store) if path.name.startswith("00000"))
    (second,) = (path for path in segments(store) if path.name.startswith("00001"))
    good = first.read_bytes()
    payload = checkpoint.load(first)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1

    def of(**change: Any) -> bytes:
        checkpoint.save(tmp_path / "made.pt", payload | change)
        return (tmp_path / "made.pt").read_bytes()

    for damage in (
        bytes(flipped),
        good[: len(good) // 2],
        b"",
        segments(foreign)[0].read_bytes(),
        second.read_bytes(),
        of(rows=payload["rows"][:, :2]),
        of(rows=payload["rows"].float()),
        of(which=payload["which"][:3]),
        of(which=payload["which"] & 0x7F),
        of(which=3),
        of(key="other"),
    ):
        first.write_bytes(damage)
        again = answering(data, teacher, store)
        assert same(answers(again), expected)
        assert again.caches[0].misses == data.steps_per_epoch * 8
        assert first.name in capsys.readouterr().out
        for path in segments(store):
            if path.name.startswith("00000"):
                path.unlink()
        first.write_bytes(good)
    assert same(answers(answering(data, teacher, store)), expected)


def test_a_full_disk_costs_the_store_not_the_run(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, teacher, store = store_of(tmp_path, small_npz)
    expected = answers(answering(data, teacher, None))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)  # type: ignore[attr-defined]
    assert same(answers(answering(data, teacher, store)), expected)
    assert capsys.readouterr().err.count("the teacher's logits are not stored from here on") == 1
    monkeypatch.undo()
    assert not segments(store)


def test_what_a_store_depends_on(small_npz: Path, tmp_path: Path) -> None:
    """Teacher, precision, images, policy, view seed, what is mixed; not the number of views, epochs, seed."""
    first = store_of(tmp_path, small_npz)[2].path
    for same_store in ({"views": 5}, {"seed": 3}, {"epochs": 9}, {"val_split": 5}):
        assert store_of(tmp_path, small_npz, replace(RECIPE, **same_store))[2].path == first  # type: ignore[arg-type]
    others = [store_of(tmp_path, small_npz, seed=2)[2].path]
    for change in ({"view_seed": 1}, {"augment": "none", "views": None}, {"cutout": 8}, {"mixup": True}):
        others.append(store_of(tmp_path, small_npz, replace(RECIPE, **change))[2].path)  # type: ignore[arg-type]
    others.append(store_of(tmp_path, small_npz, replace(RECIPE, mixup=True, val_split=5))[2].path)
    data, teacher, _ = store_of(tmp_path, small_npz)
    teacher.network.precision = torch.bfloat16
    key = store_key(data, teacher, teacher_arch="small", name="small", digest="d", classes=4, view_seed=0)
    others.append(LogitStore(tmp_path, key).path)
    others.append(LogitStore(tmp_path, {**key, "data_digest": "e"}).path)
    assert len({first, *others}) == len(others) + 1


def test_the_key_lies_in_clear_text_beside_the_segments(small_npz: Path, tmp_path: Path) -> None:
    data, teacher, store = store_of(tmp_path, small_npz)
    answers(answering(data, teacher, store), 1)
    key = json.loads((store.path / "key.json").read_text())
    assert key == store.key
    assert {"teacher_digest", "data_digest", "precision", "size", "mean", "std", "policy", "view_seed"} <= set(key)


def test_what_a_killed_save_left_behind_is_removed(small_npz: Path, tmp_path: Path) -> None:
    data, teacher, store = store_of(tmp_path, small_npz)
    answers(answering(data, teacher, store), 1)
    before, total = set(store.path.iterdir()), store.tidy()
    assert total == sum(path.stat().st_size for path in store.path.glob("*.pt"))
    for name, age in (("00000-1-a.pt.7-b.partial", 2 * 86_400), ("00000-1-c.pt.8-d.partial", 60)):
        (store.path / name).write_bytes(b"cut")
        os.utime(store.path / name, (time.time() - age,) * 2)
    assert store.tidy() == total
    assert {path.name for path in set(store.path.iterdir()) - before} == {"00000-1-c.pt.8-d.partial"}


def test_runs_share_slots_whatever_their_number_of_views(small_npz: Path) -> None:
    """K views are the first K of the image's own order, so that a store serves every K."""
    few, many = (training(small_npz, replace(RECIPE, views=k)) for k in (2, 5))
    for epoch in range(2):
        for one, two in zip(few.batches(epoch), many.batches(epoch), strict=True):
            assert torch.equal(one.images, two.images)
    assert [few.plan.order.view_index(e) for e in range(5)] == [0, 1, 0, 1, 0]


def test_size_is_told_before_anything_is_allocated(tmp_path: Path) -> None:
    line = "162 views of 50,000 images, 10 logits: 162 MB at most"
    assert fits(162, 50_000, Encoding(10), 50, tmp_path) == (True, line)
    fit, line = fits(100, 1_281_167, Encoding(1000), 50, tmp_path)
    assert not fit
    assert "256 GB at most, more than --store-limit 50 GB; --views 19 fits" in line
    assert "--views 18 fits" in fits(100, 1_281_167, Encoding(1000), 50, tmp_path, even=True)[1]
    line = "1 views of 14,197,122 images, 21841 logits: 620 GB at most, more than --store-limit 50 GB"
    assert fits(1, 14_197_122, Encoding(21841), 50, tmp_path) == (False, line)
    assert not fits(1, 10**9, Encoding(10**6), 1e9, tmp_path)[0]  # more than the disk has


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_train_kd_uses_the_store(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the digest of the final state: without, filling it, from a full one; another T, w, seed asks for nothing."""
    options = Options(data=str(small_npz), teacher_checkpoint=teacher_file(tmp_path / "teacher.pth"))

    def state(name: str, recipe: Recipe = KD, **more: Any) -> tuple[str, str]:
        train_kd.train(recipe, replace(options, output=str(tmp_path / name), **more))
        payload = checkpoint.load(tmp_path / name / "last.pt")
        return checkpoint.digest([payload["student"], payload["optimizer"], payload["ranks"]]), capsys.readouterr().out

    without, said = state("without", store=False)
    assert "store:" not in said
    assert "teacher: 80 views computed, no store" in said
    filling, said = state("filling")
    assert "teacher: 80 views computed, 0 were in the store" in said
    full, said = state("full")
    assert "teacher: 0 views computed, 80 were in the store" in said
    assert without == filling == full
    assert "0 views computed" in state("other", KD.with_flags({"T": 1.0, "w": 0.5, "seed": 3, "epochs": 1}))[1]
    assert "store: off: 2 views of 40 images" in state("limit", store_limit=0)[1]
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    assert summary["teacher_precision"]["images"] == 20


def test_answers_ahead_of_the_step(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches at a time as fill a block of the teacher."""
    data, _, store = store_of(tmp_path, small_npz)
    teacher = Teacher(small_network(seed=1), block=32)
    calls: list[int] = []
    logits = teacher.logits
    monkeypatch.setattr(teacher, "logits", lambda images: (calls.append(len(images)), logits(images))[1])
    assert len(answers(answering(data, teacher, store), 1)) == 5
    assert calls == [32, 8]


def test_answers_are_kept_as_time_passes(small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "FLUSH_SECONDS", -1.0)
    data, _, store = store_of(tmp_path, small_npz)
    batches = answering(data, Teacher(small_network(seed=1), block=8), store).batches(0)
    next(batches), next(batches), next(batches)
    assert store.coverage() == {0: 24}
    assert len(segments(store)) == 3


def test_top_k_answers_are_kept_to_the_bit(small_npz: Path, tmp_path: Path) -> None:
    """Through float16 rows, classes as bits in them, on disk and back; without a store the same."""
    data, teacher, dense = store_of(tmp_path, small_npz)
    store = LogitStore(tmp_path, {**dense.key, "top_k": 2})
    assert store.path != dense.path
    filling, full = answering(data, teacher, store), answering(data, teacher, store)
    sources = [answering(data, teacher, None, top_k=2), filling, full]
    for batches in zip(*(source.batches(0) for source in sources), strict=True):
        expected = top_k_logits(teacher.logits(batches[0].images), batches[0].labels, 2)
        for batch in batches:
            found = batch.teacher_logits
            assert isinstance(found, TopKLogits)
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    again = answering(data, teacher, store)
    list(again.batches(0))
    assert again.caches[0].misses == 0
    assert again.caches[0].verify(data, 20) == (20, 20, 0.0)


def test_top_k_rows() -> None:
    assert Encoding(1000).width == 1000
    assert Encoding(1000, 50).width == 109
    logits = torch.randn(5, 30_000).half().float()
    encoding = Encoding(30_000, 20)
    rows = encoding.encode(logits, torch.full((5,), 29_999))
    assert rows.shape == (5, encoding.width)
    found = encoding.decode(rows)
    assert isinstance(found, TopKLogits)
    assert torch.equal(found.classes, logits.topk(20).indices)
    assert torch.equal(found.label, logits[:, -1])
    for k in range(5):  # a row by itself begins at an odd place
        alone = encoding.decode(rows[k : k + 1])
        assert isinstance(alone, TopKLogits)
        assert torch.equal(alone.rest[0], found.rest[k])
    for classes, k in ((10, 10), (40_000, 5)):
        with pytest.raises(UserError, match="--top-k"):
            Encoding(classes, k)


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_train_kd_with_top_k(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(data=str(small_npz), teacher_checkpoint=teacher_file(tmp_path / "teacher.pth"))
    summary = train_kd.train(replace(KD, top_k=2), replace(options, output=str(tmp_path / "a")))
    said = capsys.readouterr().out
    assert "2 largest of 4 logits" in said
    assert "the gradient of the term on logits differs by" in said
    assert summary is not None
    assert 0 < summary["top_k_error"] < 1
    train_kd.train(replace(KD, top_k=2), replace(options, output=str(tmp_path / "b"), store=False))
    states = [checkpoint.load(tmp_path / name / "last.pt") for name in "ab"]
    assert checkpoint.digest(states[0]["student"]) == checkpoint.digest(states[1]["student"])
    with pytest.raises(UserError, match="--top-k knows what the other classes sum to at --T"):
        KD.with_flags({"top_k": 2, "T": 2.5})


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_a_segment_that_cannot_be_read_for_a_moment_stays(
    error: Exception,
    small_npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, teacher, store = store_of(tmp_path, small_npz)
    expected = answers(answering(data, teacher, store), 1)
    (path,) = segments(store)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    assert not store.read(0)[1].any()
    monkeypatch.undo()
    assert f"{path} cannot be read" in capsys.readouterr().out
    assert store.read(0)[1].all()
    assert same(answers(answering(data, teacher, store), 1), expected)


def test_a_segment_that_is_gone_or_cannot_be_put_aside(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process was faster, or the directory is read only: the views are answered again, nothing else."""
    data, teacher, store = store_of(tmp_path, small_npz)
    expected = answers(answering(data, teacher, store), 1)
    (path,) = segments(store)
    path.write_bytes(b"damaged")

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert same(answers(answering(data, teacher, store), 1), expected)
    assert path.name in capsys.readouterr().out
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda file: (file.unlink(), load(file))[1])
    assert same(answers(answering(data, teacher, store), 1), expected)
    assert capsys.readouterr().out == ""


def test_a_full_store_is_used_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))  # type: ignore[attr-defined]
    assert not fits(1, 50_000, Encoding(10), 50, tmp_path)[0]
    assert fits(1, 50_000, Encoding(10), 50, tmp_path, present=1_000_000)[0]


def test_verify_of_fewer_views_than_are_stored(small_npz: Path, tmp_path: Path) -> None:
    data, teacher, store = store_of(tmp_path, small_npz, replace(RECIPE, views=4))
    answers(answering(data, teacher, store), 4)
    few = training(small_npz, replace(RECIPE, views=2))
    assert LogitCache(teacher, store, store.encoding).verify(few, 1000) == (80, 80, 0.0)
