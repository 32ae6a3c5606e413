"""One run, one directory: what it is, who holds it."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.losses.kd_loss import KD
from distill.run import provenance
from distill.run import run as run_module
from distill.run.directory import RunDirectory
from distill.run.paths import find_directory, next_free
from distill.run.run import Run
from tests.runs import small_network

CPU = torch.device("cpu")
FACTS = {"data": "x", "data_digest": "1"}


def begin(path: Path, recipe: Recipe, facts: dict[str, str] = FACTS, *, extend: bool = False) -> Run:
    """A run as opening it begins it."""
    run = Run(path, recipe, Options(extend=extend), facts)
    with run:
        run.check()
        run.report()
        if not run.summary:
            run.record_start(CPU)
    return run


def hold(path: Path, barrier: Barrier, results: "multiprocessing.Queue[str]") -> None:
    barrier.wait()
    try:
        with RunDirectory(path):
            results.put("won")
            time.sleep(60)
    except UserError as error:
        results.put(str(error))


@pytest.mark.slow
def test_two_runs_at_once(tmp_path: Path) -> None:
    """Exactly one of two that start together wins, the other names it; a killed holder leaves no lock."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    holders = [context.Process(target=hold, args=(tmp_path, barrier, results)) for _ in range(2)]
    for holder in holders:
        holder.start()
    answers = sorted([results.get(timeout=60), results.get(timeout=60)])
    assert answers[1] == "won"
    assert "is in use by process " in answers[0]
    assert any(f"process {holder.pid} on" in answers[0] for holder in holders)
    for holder in holders:
        assert holder.pid
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    with RunDirectory(tmp_path):
        pass


def test_a_start_records_what_the_run_is(tmp_path: Path) -> None:
    begin(tmp_path / "run", Recipe())
    (tmp_path / "run" / "last.pt").touch()
    (tmp_path / "run" / "diverged.json").touch()
    run = begin(tmp_path / "run", Recipe())
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["starts"]) == 1  # nothing is saved yet
    run.accept()
    assert not (tmp_path / "run" / "diverged.json").exists()  # this start may end otherwise
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Recipe.from_dict(config["recipe"]) == Recipe()
    assert config["facts"] == FACTS
    assert len(config["starts"]) == 2
    start = {"time", "argv", "cwd", "data", "teacher_checkpoint", "init", "commit", "versions", "machine"}
    start |= {"class_order", "skip_bad_images"}
    assert set(config["starts"][0]) == start


def test_the_commit_of_a_result_is_that_of_the_last_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout may change in the hours between."""
    monkeypatch.setattr(run_module, "commit", lambda: "of the start")
    begin(tmp_path / "run", Recipe())
    monkeypatch.setattr(run_module, "commit", lambda: "of the end")
    with Run(tmp_path / "run", Recipe(), Options(), {**FACTS, "world_size": 1}) as run:
        results = {"test_accuracy": 1.0, "wall_seconds": 1.0, "train_images_per_second": 1.0}
        summary = run.finish(small_network(), **results)
    assert summary["commit"] == "of the start"


def test_the_commit_is_that_of_this_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a repository around it, nor of one that the environment names."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x")
        found = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "x")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == git("rev-parse", "HEAD")
    records = tmp_path / "checkpoints" / "records"
    records.mkdir(parents=True)
    files = [records / "x.json", tmp_path / "page.md", tmp_path / "code.py"]
    for file in files:
        file.write_text("before")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    (tmp_path / "cifar10" / "models").mkdir(parents=True)
    (tmp_path / "cifar10" / "models" / "mine.py").write_text("a network of one's own")
    assert provenance.commit() == git("rev-parse", "HEAD") + "-dirty"
    (tmp_path / "cifar10" / "models" / "mine.py").unlink()
    for file in files:
        assert provenance.commit() == git("rev-parse", "HEAD")
        file.write_text("after")
    assert provenance.commit() == git("rev-parse", "HEAD") + "-dirty"  # by the code, not by a page or a record
    for unpacked in (tmp_path / "unpacked", tmp_path / "deeper" / "unpacked"):
        unpacked.mkdir(parents=True)
        monkeypatch.setattr(provenance, "ROOT", unpacked)
        assert provenance.commit() is None
    git("worktree", "add", "--quiet", "tree")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "tree")
    assert provenance.commit() == git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert provenance.commit() is not None


def test_a_recipe_of_an_older_version_has_the_defaults_of_what_came_later(tmp_path: Path) -> None:
    begin(tmp_path, Recipe())
    (tmp_path / "last.pt").touch()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["recipe"]["label_smoothing"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    begin(tmp_path, Recipe())


def test_another_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, Recipe())
    (tmp_path / "last.pt").touch()
    config = json.loads((tmp_path / "config.json").read_text())
    config["starts"][0]["machine"]["device"] = "NVIDIA H200"
    (tmp_path / "config.json").write_text(json.dumps(config))
    begin(tmp_path, Recipe())
    assert "note: device NVIDIA H200 before, cpu" in capsys.readouterr().out


def test_a_lock_that_cannot_be_had_for_another_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match=r"cannot lock .*Input/output error"), RunDirectory(tmp_path):
        pass


def test_the_former_holder_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 4711 on elsewhere")
    with RunDirectory(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"), RunDirectory(tmp_path):
        pass


def test_another_recipe_is_refused_with_the_fields(tmp_path: Path) -> None:
    begin(tmp_path, Recipe(epochs=9, lr=1e9))
    begin(tmp_path, Recipe(epochs=3))  # the former never saved anything
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match=r"--lr was 0\.1, is 0\.2, data_digest was 1, is 2"):
        begin(tmp_path, Recipe(epochs=3, lr=0.2), {**FACTS, "data_digest": "2"})
    with pytest.raises(UserError, match=r"--epochs was 3, is 5; --extend"):
        begin(tmp_path, Recipe(epochs=5))
    with pytest.raises(UserError, match="--epochs was 3, is 2"):
        begin(tmp_path, Recipe(epochs=2), extend=True)
    run = begin(tmp_path, Recipe(epochs=5), extend=True)
    begin(tmp_path, Recipe(epochs=3))  # that start has saved nothing: the run is what it was
    run.accept()
    config = run.read_config()
    assert config is not None
    assert config["recipe"]["epochs"] == 5


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"recipe": {}}', "\x00", '{"recipe": [], "facts": {}, "starts": []}']
)
def test_damaged_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        begin(tmp_path, Recipe())


def test_unknown_fields_of_another_version() -> None:
    with pytest.raises(UserError, match="does not know: no_such_field"):
        Recipe.from_dict({**Recipe().to_dict(), "no_such_field": 1})


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot use"), RunDirectory(tmp_path / "run"):
        pass


def test_names_and_fresh(tmp_path: Path) -> None:
    kd = replace(Recipe(), teacher_arch="resnet152", method=KD(), seed=2)
    assert kd.run_name == "kd-resnet152-T3-w0.8-seed2"
    images = SimpleNamespace(name="cifar10", digest="1", classes=())
    assert find_directory(Options(), kd, images.name, images.digest).parts[-3:] == (
        "cifar10",
        "efficientnet_b0",
        kd.run_name,
    )
    for expected in ("run", "run-2", "run-3"):
        options = Options(output=str(tmp_path / "run"), fresh=True)
        path = find_directory(options, kd, images.name, images.digest)
        assert path == next_free(tmp_path / "run") == tmp_path / expected
        path.mkdir()


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    (tmp_path / "last.pt.partial").write_bytes(b"half")
    with RunDirectory(tmp_path):
        assert not (tmp_path / "last.pt.partial").exists()
