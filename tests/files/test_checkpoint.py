"""Saves that survive, and loads that verify."""

import errno
import multiprocessing
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from distill.errors import CheckpointError
from distill.files import checkpoint
from distill.models import weights

PAYLOAD = {
    "epoch": 3,
    "rate": 0.1,
    "name": "x",
    "nothing": None,
    "records": [{"loss": 1.5}],
    "student": {"weight": torch.randn(300, 10), "count": torch.tensor(4)},
    "half": torch.randn(5).bfloat16(),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.pt"
    checkpoint.save(path, PAYLOAD)
    return path


# -------------------------------------------------------------------------------------------------------------- saving
def test_round_trip(saved: Path) -> None:
    assert checkpoint.digest(checkpoint.load(saved)) == checkpoint.digest(PAYLOAD)
    assert torch.load(saved, weights_only=True)["epoch"] == 3  # plain torch opens it
    assert [p.name for p in saved.parent.iterdir()] == ["last.pt"]


def test_digest_sees_every_difference() -> None:
    weights = torch.randn(4, 3)
    nudged = weights.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(10.0))
    contents = [weights, nudged, weights.t(), weights.double(), weights.reshape(3, 4), {"a": 1}, {"a": 1.0}, {"b": 1}]
    contents += [{"a": True}, {"a": None}, {"a": "1"}, [1, 2], [2, 1], [[1], 2], torch.tensor(0.0), torch.tensor(-0.0)]
    assert len({checkpoint.digest(c) for c in contents}) == len(contents)
    assert checkpoint.digest(weights.clone().to(torch.float32)) == checkpoint.digest(weights)


def test_refuses_to_save_what_weights_only_would_not_load(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="PosixPath"):
        checkpoint.save(tmp_path / "x.pt", {"path": tmp_path})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "directory"])
def test_failing_system_call(saved: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    """Path, cause and free bytes in one line; no temporary file; what was saved before still loads."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    names = {"write": "_write", "directory": "_sync_directory"}
    if call in names:
        monkeypatch.setattr(checkpoint, names[call], fail)
    else:
        monkeypatch.setattr(f"distill.files.checkpoint.os.{call}", fail)
    with pytest.raises(CheckpointError, match=r"bytes free") as error:
        checkpoint.save(saved, {"epoch": 4}, keep_previous=True)
    assert str(saved) in str(error.value)
    assert os.strerror(code) in str(error.value)
    monkeypatch.undo()
    assert not list(saved.parent.glob(f"*{checkpoint.TEMPORARY}"))
    payload, _ = checkpoint.load_latest(saved.parent)
    assert payload is not None
    assert payload["epoch"] == (4 if call == "directory" else 3)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_directory_without_fsync_is_passed_by(saved: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Some file systems have no fsync of directories; a file that is not synced stays an error."""
    kinds, whole = {True}, os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) in kinds:
            raise OSError(code, os.strerror(code))
        whole(descriptor)

    monkeypatch.setattr("distill.files.checkpoint.os.fsync", fsync)
    checkpoint.save(saved, {"epoch": 4}, keep_previous=True)
    checkpoint.write_atomically(saved.parent / "config.json", b"{}")
    assert checkpoint.load(saved)["epoch"] == 4
    kinds.add(False)
    with pytest.raises(CheckpointError, match="bytes free"):
        checkpoint.save(saved, {"epoch": 5}, keep_previous=True)


def test_full_disk() -> None:
    """The real thing: /dev/full accepts nothing."""
    with pytest.raises(OSError, match="No space left"):
        checkpoint._write(Path("/dev/full"), b"x")


def save_often(path: Path, count: int) -> None:
    for _ in range(count):
        checkpoint.save(path, PAYLOAD)


@pytest.mark.slow
def test_two_processes_write_one_file(saved: Path) -> None:
    """As two runs do with a teacher's answers in the cache: both get through, and the file is whole."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=save_often, args=(saved, 100)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        checkpoint.load(saved)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in saved.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_the_former_file_is_kept(saved: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:  # as on a file system without them
        monkeypatch.setattr(
            "distill.files.checkpoint.os.link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, ""))
        )
    for epoch in (4, 5):
        checkpoint.save(saved, {"epoch": epoch}, keep_previous=True)
    assert checkpoint.load(saved)["epoch"] == 5
    assert checkpoint.load(saved.with_name("previous.pt"))["epoch"] == 4
    assert len(list(saved.parent.iterdir())) == 2


def test_a_file_that_cannot_be_read_for_a_moment_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(saved, {"epoch": 4}, keep_previous=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be read .*try again, or remove it if that lasts"):
            checkpoint.load_latest(saved.parent)
    payload, _ = checkpoint.load_latest(saved.parent)
    assert payload == {"epoch": 4}


def test_a_kill_between_the_two_renames_leaves_nothing_behind(saved: Path) -> None:
    os.link(saved, saved.with_name("previous.pt"))  # one file with both names
    checkpoint.save(saved, {"epoch": 4}, keep_previous=True)
    assert checkpoint.load(saved)["epoch"] == 4
    assert sorted(path.name for path in saved.parent.iterdir()) == ["last.pt", "previous.pt"]


def test_a_cache_that_cannot_be_written_is_no_error(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save_cache(saved / "below a file" / "x.pt", {"a": 1})
    assert "computed again next time" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- damage
def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def truncate_to_head(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def web_page(path: Path) -> None:
    path.write_bytes(b"\n<!DOCTYPE html><html>sign in</html>")


def lfs_pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def other_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2, 3]))


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(10_000_000) if name.endswith("data/0") else content)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/distill-attack-worked",)


def attack(path: Path) -> None:
    torch.save({"student": Attack()}, path)


def endless(path: Path) -> None:
    content: list[Any] = []
    content += [content, content]
    torch.save({"student": content}, path)


def multiplying(path: Path) -> None:
    content: list[Any] = [0]
    for _ in range(40):
        content = [content] * 8
    torch.save({"student": content}, path)


def deep(path: Path) -> None:
    content: dict[str, Any] = {"digest": ""}
    for _ in range(200):
        content = {"digest": "", "student": content}
    torch.save(content, path)


def meta(path: Path) -> None:
    torch.save({"student": {"weight": torch.empty(3, device="meta")}}, path)


DAMAGES = [truncate, truncate_to_head, empty, noise, web_page, lfs_pointer, directory, fifo, broken_link]
DAMAGES += [other_pickle, compressed, attack, endless, multiplying, deep, meta]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_detected_and_the_previous_one_taken(saved: Path, damage: Callable[[Path], None]) -> None:
    checkpoint.save(saved, {"epoch": 4, "student": {"w": torch.zeros(3)}}, keep_previous=True)
    damage(saved)
    for load in (checkpoint.load, weights.load):
        with pytest.raises(CheckpointError, match=r"last\.pt") as error:
            load(saved)
        assert "\n" not in str(error.value)
    payload, warnings = checkpoint.load_latest(saved.parent)
    assert payload is not None
    assert payload["epoch"] == 3
    assert len(warnings) == 1
    assert "continuing from previous.pt" in warnings[0]
    assert not os.path.lexists(saved)  # set aside, so that it does not become the next previous.pt
    assert not Path("/tmp/distill-attack-worked").exists()


def test_attack_names_the_global(saved: Path) -> None:
    attack(saved)
    with pytest.raises(CheckpointError, match=r"refused.*(posix|os)\.system"):
        checkpoint.load(saved)


def test_every_flipped_bit_is_found(saved: Path) -> None:
    """200 single bits all over the file: an error, or (in a place that means nothing) the same content."""
    content = saved.read_bytes()
    found = 0
    for k in range(200):
        position = (k * 7919 * 8 + k) % (8 * len(content))
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        saved.write_bytes(flipped)
        try:
            assert checkpoint.digest(checkpoint.load(saved)) == checkpoint.digest(PAYLOAD)
        except CheckpointError:
            found += 1
    assert found > 100


def test_the_digest_counts_also_where_checksums_fit(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["student"]["weight"][0, 0] += 1
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match="digest"):
        checkpoint.load(saved)


def test_no_checkpoint_loads(saved: Path) -> None:
    checkpoint.save(saved, {"epoch": 4}, keep_previous=True)
    for name in ("last.pt", "previous.pt"):
        noise(saved.with_name(name))
    with pytest.raises(CheckpointError, match="--fresh starts over"):
        checkpoint.load_latest(saved.parent)


def test_a_kill_between_the_two_renames(saved: Path) -> None:
    os.replace(saved, saved.with_name("previous.pt"))
    payload, warnings = checkpoint.load_latest(saved.parent)
    assert payload is not None
    assert warnings == []


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path) == (None, [])


@pytest.mark.parametrize("stride", [0, 1])
def test_a_tensor_of_10_to_the_12_elements(tmp_path: Path, stride: int) -> None:
    """Refused without taking the memory."""
    path = tmp_path / "huge.pt"
    tensor = torch.zeros(4)
    torch.save({"weight": tensor.as_strided((10**12,), (0,)) if stride == 0 else tensor}, path)
    if stride == 1:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(
                    name, content.replace(b"K\x04\x85", b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85")
                )
    with pytest.raises(CheckpointError, match=r"huge\.pt"):
        weights.load(path)
