"""Runs and stores are known by what is in the images, not by what the directory of them is called or where it lies."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cifar10 import train_ce, train_kd
from cifar10.data import load_data
from distill.config.recipe import Options
from distill.errors import UserError
from distill.run.paths import find_directory
from distill.run.run import Run
from distill.training import engine
from distill.training.stop import Stopped
from imagenet import train_ce as train_photos
from imagenet.recipes import RECIPES as PHOTO_RECIPES
from imagenet.recipes import ImageNetOptions
from tests.cifar10.test_train import CE, KD
from tests.runs import train

SMALL = replace(CE, arch="densenet_cifar", epochs=1)


@pytest.fixture
def staged(small_npz: Path, tmp_path: Path) -> tuple[str, str]:
    """The same images at two places under two names, as jobs 4711 and 4712 stage them."""
    places = [tmp_path / "scratch" / f"{job}.npz" for job in (4711, 4712)]
    places[0].parent.mkdir()
    return tuple(str(shutil.copy(small_npz, place)) for place in places)  # type: ignore[return-value]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_job_finds_its_run(home: Path, staged: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        train_ce.train(SMALL, Options(data=staged[0], steps=3))
    summary = train_ce.train(SMALL, Options(data=staged[1]))
    run = home / "4711" / "densenet_cifar" / "ce-seed0"
    out = said(capsys)
    assert f"note: {run} is the run of this recipe on these images, under another name of theirs" in out
    assert "continuing at epoch 1, step 3" in out
    assert not (home / "4712").exists()
    assert summary is not None
    assert summary["data"]["name"] == "4712"
    assert train_ce.train(SMALL, Options(data=staged[0])) == summary
    evaluated = train_ce.train(SMALL, Options(data=staged[1], evaluate=True))
    assert evaluated is not None
    assert evaluated["accuracy"] == summary["test_accuracy"]


def test_output_takes_the_same_images_under_any_name(staged: tuple[str, str], tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    with pytest.raises(Stopped):
        train_ce.train(SMALL, Options(data=staged[0], output=output, steps=3))
    assert train_ce.train(SMALL, Options(data=staged[1], output=output))


@pytest.mark.slow
def test_teacher_and_store_are_found_again(
    home: Path, staged: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(KD, arch="densenet_cifar", epochs=1)
    train_kd.train(recipe, Options(data=staged[0]))
    assert "it is trained first by CE" in said(capsys)
    train_kd.train(recipe.with_flags({"T": 1.0}), Options(data=staged[1]))
    out = said(capsys)
    assert "trained first" not in out
    assert f"note: {home / '4711' / 'densenet_cifar' / 'ce-seed0'} is on these images, under another name" in out
    assert "0 views computed" in out
    assert [path.name[:15] for path in (home / "stores").iterdir()] == ["densenet_cifar-"]
    assert sorted(path.name for path in (home / "4712" / "densenet_cifar").iterdir()) == [
        "kd-densenet_cifar-T1-w0.8-seed0"
    ]


@pytest.mark.usefixtures("home")
def test_photos_are_known_by_their_paths_below_the_directory(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(PHOTO_RECIPES["standard"], arch="shufflenet_v2_x0_5", image_size=32, batch_size=8, epochs=1)
    copy = shutil.copytree(photos, tmp_path / "scratch" / "4712", copy_function=shutil.copyfile)
    link = tmp_path / "link"
    link.symlink_to(photos)
    options = ImageNetOptions(data=str(photos), workers=0)
    with pytest.raises(Stopped):
        train_photos.train(recipe, replace(options, steps=1))
    with pytest.raises(Stopped):
        train_photos.train(recipe, replace(options, steps=1, data=str(link)))
    train_photos.train(recipe, replace(options, data=str(copy)))
    assert "continuing at epoch 1, step 2" in said(capsys)


def begin(path: Path, epochs: int = 0, digest: str = "1", **change: object) -> Path:
    """A run that has begun, with so many epochs recorded."""
    recipe = replace(SMALL, epochs=9, **change)  # type: ignore[arg-type]
    with Run(path, recipe, Options(), {"data": path.parts[-3], "data_digest": digest}) as run:
        run.record_start(torch.device("cpu"))
        run.write_metrics([{"epoch": k} for k in range(epochs)])
        (path / "last.pt").touch()
    return path


def test_which_run_is_taken(home: Path, small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The own one, else the one under another name that is furthest; of this recipe and these images alone."""
    data = replace(load_data(str(small_npz)), name="mine")
    object.__setattr__(data, "digest", "1")
    recipe, name = replace(SMALL, epochs=9), Path("densenet_cifar") / "ce-seed0"

    def taken(options: Options = Options(), change: int = 9) -> Path:  # noqa: B008 frozen
        return find_directory(options, replace(recipe, epochs=change), data.name, data.digest)

    assert taken() == home / "mine" / name
    home.mkdir()
    (home / "README.md").touch()
    begin(home / "a" / name, 8, digest="2")
    begin(home / "b" / name, 8, lr=0.2)
    (home / "c" / name).mkdir(parents=True)
    (home / "c" / name / "config.json").write_text("damaged")
    assert taken() == home / "mine" / name
    begin(home / "d" / name, 1)
    begin(home / "e" / name, 2)
    assert said(capsys) == ""
    assert taken() == home / "e" / name
    assert "under another name" in said(capsys)
    assert taken(Options(extend=True), 10) == home / "e" / name
    assert taken(Options(), 10) == home / "mine" / name
    assert taken(Options(output="x")) == Path("x")
    assert taken(Options(fresh=True)) == home / "mine" / name
    begin(home / "mine" / name)
    assert taken() == home / "mine" / name


def test_processes_with_copies_under_other_names_agree(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = engine.gather
    other = {"data": "elsewhere"}
    monkeypatch.setattr(engine, "gather", lambda value: [{**value, **other}] if "data" in value else gather(value))
    train(tmp_path / "run", small_npz)
    other["data_digest"] = "other"
    with pytest.raises(UserError, match="do not have the same data"):
        train(tmp_path / "other", small_npz)
