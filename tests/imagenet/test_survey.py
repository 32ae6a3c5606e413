"""Photos that break: found before the first step, or ending a run as a signal does; and ImageNet's unsorted val/."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import distill.teacher.teacher
from distill.errors import BrokenImage, UserError
from distill.files import checkpoint
from distill.training.stop import Stopped
from imagenet import survey, train_ce, train_kd, val_map
from imagenet.augment import PhotoViews
from imagenet.data import load_data
from imagenet.loader import Findings, Job, Workers
from imagenet.models import find
from tests.parallel.test_processes import processes

SMALL = ["--arch", "mobilenet_v3_small", "--image-size", "32", "--batch-size", "8", "--epochs", "2", "--lr", "0.01"]
SMALL += ["--workers", "0"]


@pytest.fixture
def own(photos: Path, tmp_path: Path, home: Path) -> Path:
    """A copy of the photos that a test may break."""
    assert home
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path / "photos"


def broken(file: Path, keep: int = 300) -> bytes:
    """Cut a file short. Returns what it was."""
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    return whole


def weights(run: Path) -> str:
    return checkpoint.digest(checkpoint.load(run / "last.pt")["student"])


def test_broken_photos_are_found_before_the_first_step(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [own / "val" / "n1" / "25.JPEG", own / "val" / "n3" / "31.JPEG", own / "train" / "n0" / "04.JPEG"]
    contents = [broken(file) for file in files]
    flags = [str(own), *SMALL, "--epochs", "1", "--output", str(tmp_path / "run")]
    with pytest.raises(BrokenImage, match=r"3 images are broken: .*; --skip-bad-images leaves out") as error:
        train_ce.main(flags)
    assert sorted(error.value.files) == sorted(map(str, files))
    assert not (tmp_path / "run" / "last.pt").exists()
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    train_ce.main(flags)
    assert "8 photos to evaluate on decoded once" in capsys.readouterr().out
    train_ce.main([*flags, "--extend", "--epochs", "2"])
    assert "decoded once" not in capsys.readouterr().out  # it is remembered


def test_what_is_odd_is_said_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    for name in ("train/n0/04.JPEG", "train/n1/01.JPEG", "val/n1/25.JPEG"):
        with Image.open(own / name) as image:
            image.save(own / name, exif=exif)
    Image.fromarray(np.full((40, 40), 4095, np.uint16)).save(own / "val" / "n0" / "dim.png")
    photos = load_data(str(own), Workers(0))
    training, tests = SimpleNamespace(files=photos.train_files), {"test": SimpleNamespace(files=photos.val_files)}
    for _ in range(2):  # the second time it is remembered
        survey.survey(training, tests, Workers(0))
        said = capsys.readouterr().out
        assert "note: 2 of the first 24 training files carry an EXIF orientation, which is ignored" in said
        assert said.count("val/n0/dim.png: 16 bits, but no value from 4096 on") == 1


def test_what_was_broken_is_looked_at_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that did not answer once leaves no file broken for ever."""
    files = [str(file) for file in sorted((own / "val").rglob("*.JPEG"))]
    read = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path.name == "25.JPEG":
            raise OSError(5, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        assert list(survey.look(files, "photos", Workers(0)).broken) == [str(own / "val" / "n1" / "25.JPEG")]
    assert not survey.look(files, "photos", Workers(0)).broken


def test_what_is_remembered_is_told_by_the_names_that_are_asked(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is called with a relative path, and evaluated by the absolute one that it recorded."""
    broken(own / "val" / "n1" / "25.JPEG")
    counts = []
    for place, source in ((own.parent, own.name), (own.parent, str(own)), (own, "."), (Path("/"), str(own))):
        monkeypatch.chdir(place)
        counts.append(len(load_data(source, Workers(0), skip_bad_images=True).val_files))
    assert counts == [counts[0]] * 4
    assert counts[0] == len(list((own / "val").rglob("*.JPEG"))) - 1


def test_a_survey_that_is_cut_goes_on(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(file) for file in sorted((own / "train").rglob("*.*"))]
    broken(Path(files[3]))
    monkeypatch.setattr(survey, "SECTION", 10)
    examine, seen = Workers.examine, []

    def cut(workers: Workers, names: list[str], decoder: str) -> Iterator[Findings]:
        seen.append(len(names))
        if names == files[20:]:
            raise KeyboardInterrupt
        return examine(workers, names, decoder)

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "examine", cut)
        with pytest.raises(KeyboardInterrupt):
            survey.look(files, "photos", Workers(0))
    assert seen == [10, 10, len(files) - 20]
    assert list(survey.look(files, "photos", Workers(0)).broken) == [files[3]]
    assert f"{len(files) - 20} photos decoded once" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 2])
def test_all_broken_photos_in_the_making_are_named(count: int, own: Path) -> None:
    files = sorted(str(file) for file in (own / "train").rglob("*.*"))
    damaged = [files[0], files[9], files[23]]
    for file in damaged:
        broken(Path(file))

    def jobs() -> Iterator[Job]:
        for start in (0, 12):
            indices = np.arange(start, start + 12)
            yield Job([files[i] for i in indices], indices, indices)

    with Workers(count) as workers, pytest.raises(BrokenImage) as error:
        list(workers.render(PhotoViews("crop", 32), jobs()))
    # without workers nothing is in the making but the batch itself
    assert sorted(error.value.files) == (damaged if count else damaged[:2])


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training photos break where the survey does not look, and those to evaluate on after it."""
    monkeypatch.setattr(survey, "FIRST", 0)
    monkeypatch.setattr(survey, "look", lambda *_: survey.Findings())


@pytest.mark.slow
@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", ["train/n2/02.JPEG", "val/n2/26.JPEG"])
def test_a_run_ends_saved_and_a_mended_file_continues_it(name: str, own: Path, tmp_path: Path) -> None:
    """The weights are those of a run that never met a broken file; what a later file of another size is, is refused."""
    flags = [str(own), *SMALL, "--output"]
    train_ce.main([*flags, str(tmp_path / "whole")])
    content = broken(own / name)
    with pytest.raises(Stopped, match=rf"saved in .*cut: cannot decode .*{name}.*mended, the same command") as error:
        train_ce.main([*flags, str(tmp_path / "cut")])
    assert error.value.exit_code == 2
    assert "--skip-bad-images --allow-data-change" in str(error.value)
    saved = checkpoint.load(tmp_path / "cut" / "last.pt")
    assert saved["epoch"] or saved["step"]
    with pytest.raises(UserError, match="cannot decode"):
        train_ce.main([*flags, str(tmp_path / "cut")])
    (own / name).write_bytes(content)
    with pytest.raises(Stopped, match="stopped after 1 steps"):
        train_ce.main([*flags, str(tmp_path / "cut"), "--steps", "1"])
    train_ce.main([*flags, str(tmp_path / "cut")])  # also from a checkpoint that has met no broken file
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    (own / "train" / "n0" / "04.JPEG").write_bytes((own / "train" / "n1" / "01.JPEG").read_bytes())
    with pytest.raises(UserError, match=r"data_digest was .*--allow-data-change goes on .*as many, but others"):
        train_ce.main([*flags, str(tmp_path / "cut")])


@pytest.mark.usefixtures("unseen")
def test_nothing_is_saved_of_a_run_that_has_not_begun(own: Path, tmp_path: Path) -> None:
    for file in (own / "train").rglob("*.*"):
        broken(file)
    with pytest.raises(BrokenImage, match="images are broken"):
        train_ce.main([str(own), *SMALL, "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "last.pt").exists()


def test_leaving_files_out_is_a_recorded_change(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(own), *SMALL, "--batch-size", "12", "--output", str(tmp_path / "run")]
    with pytest.raises(Stopped, match="stopped after 2 steps"):
        train_ce.main([*flags, "--steps", "2"])
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1
    broken(own / "train" / "n2" / "02.JPEG")
    with pytest.raises(UserError, match=r"02\.JPEG.*--skip-bad-images"):
        train_ce.main(flags)
    flags.append("--skip-bad-images")
    with pytest.raises(UserError, match=r"with 23 training, 8 validation photos \(24 training, 8 validation photos b"):
        train_ce.main(flags)
    train_ce.main([*flags, "--allow-data-change"])
    assert "goes on with 23 training, 8 validation photos (24 training, 8" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [change["images"][1] for change in summary["data_changes"]] == ["23 training, 8 validation photos"]
    train_ce.main(flags)  # finished: the change is known by now
    assert "finished before" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("unseen")
def test_the_teacher_is_not_asked_again_after_a_file_was_mended(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a block is a batch, so that the first ones are answered
    monkeypatch.setattr(distill.teacher.teacher, "images_at_once", lambda *_: 8)
    torch.save(find("mobilenet_v3_small").build(num_classes=4).state_dict(), tmp_path / "teacher.pth")
    flags = [str(own), *SMALL, "--teacher-arch", "mobilenet_v3_small", "--teacher-precision", "float32", "--views", "1"]
    flags += ["--render-size", "32", "--teacher-checkpoint", str(tmp_path / "teacher.pth")]
    flags += ["--output", str(tmp_path / "run")]
    content = broken(own / "train" / "n2" / "02.JPEG")
    with pytest.raises(Stopped, match=r"epoch 1, step [12] of 3.*cannot decode"):
        train_kd.main(flags)
    done = checkpoint.load(tmp_path / "run" / "last.pt")["step"]
    capsys.readouterr()
    (own / "train" / "n2" / "02.JPEG").write_bytes(content)
    train_kd.main(flags)
    assert f"teacher: {24 - 8 * done} views computed" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_end_together_and_saved(own: Path, tmp_path: Path) -> None:
    """One of them meets the broken file; the other one is at the same step and ends with it."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    words = ["broken", own, *SMALL, "--device", "cpu", "--"]
    content = broken(own / "train" / "n2" / "02.JPEG")
    found = processes(2, *words, cut)
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("cannot decode") == 1
    assert f"saved in {cut}: cannot decode" in found.stderr
    (own / "train" / "n2" / "02.JPEG").write_bytes(content)
    found = processes(2, *words, cut, whole)
    assert found.returncode == 0, found.stderr
    assert weights(cut) == weights(whole)


# --------------------------------------------------------------------------------------------------- an unsorted val/
@pytest.fixture
def flat(own: Path) -> dict[str, str]:
    """Move the photos of val/CLASS/ to val/, named as ImageNet's are. Returns file -> class."""
    named = {}
    for number, file in enumerate(sorted((own / "val").rglob("*.JPEG"), key=lambda file: file.name), start=1):
        named[f"ILSVRC2012_val_{number:08d}.JPEG"] = file.parent.name
        file.rename(own / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    for folder in (own / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()
    return named


KIT = "n2 1 kit_fox\nn0 2 setter\nn3 3 husky\nn1 4 terrier\n"
NUMBERS = {"n2": 1, "n0": 2, "n3": 3, "n1": 4}


def maps(named: dict[str, str]) -> dict[str, dict[str, str]]:
    """The usual files that say the classes: name -> content."""
    numbers = "\n".join(f"{file}\t{['n0', 'n1', 'n2', 'n3'].index(name)}" for file, name in reversed(named.items()))
    kaggle = "ImageId,PredictionString\n"
    kaggle += "".join(f"{file[:-5]},{name} 85 1 499 272 {name} 1 2 3 4\n" for file, name in reversed(named.items()))
    return {
        "numbers": {"val_map.txt": numbers},
        "caffe": {"val.txt": numbers.replace("\t", " ")},
        "names": {"val_map.txt": "".join(f"{file} {name}\n" for file, name in named.items())},
        "in val": {"val/val_map.txt": numbers},
        "kaggle": {"LOC_val_solution.csv": kaggle},
        "synsets": {"imagenet_2012_validation_synset_labels.txt": "\n".join(named.values()) + "\n"},
        "kit": {
            "ILSVRC2012_validation_ground_truth.txt": "".join(f"{NUMBERS[name]}\n" for name in named.values()),
            "map_clsloc.txt": KIT,
        },
    }


KINDS = ["numbers", "caffe", "names", "in val", "kaggle", "synsets", "kit"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_val_is_read_with_the_usual_files(kind: str, own: Path, flat: dict[str, str]) -> None:
    for name, content in maps(flat)[kind].items():
        (own / name).write_text(content)
    found = load_data(str(own), Workers(0))
    pairs = zip(found.val_files, found.val_labels.tolist(), strict=True)
    assert {Path(file).name: found.classes[label] for file, label in pairs} == flat
    for file, name in flat.items():  # sorted into folders it is the same data
        (own / "val" / name).mkdir(exist_ok=True)
        (own / "val" / file).rename(own / "val" / name / file)
    again = load_data(str(own), Workers(0))
    assert again.digest == found.digest
    assert again.val_labels.tolist() == found.val_labels.tolist()


def test_files_of_one_stem_have_their_own_classes(tmp_path: Path) -> None:
    (tmp_path / "val_map.txt").write_text("a.jpg n1\na.png n0\nb.jpeg n1\n")
    assert val_map.classes_of(tmp_path, ["val/a.png", "val/a.jpg", "val/b.jpg"], ["n0", "n1"]) == ["n0", "n1", "n1"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"val has photos but no class folders: sort them into val/CLASS/, or put val_map\.txt beside it"),
        ({"val_map.txt": "x.JPEG 0\n"}, r"val_map\.txt does not name .*ILSVRC2012_val_00000001\.JPEG, nor 7 others"),
        ({"val_map.txt": "x.JPEG\n"}, r"'x\.JPEG' is no line FILE CLASS"),
        ({"val_map.txt": "x.JPEG n0\nx.JPEG n1\n"}, r"val_map\.txt gives x\.JPEG two classes, n0 and n1"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n"}, "has 1 lines for the 8 photos"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n" * 8}, r"put its map_clsloc\.txt beside it"),
        ({"ILSVRC2012_validation_ground_truth.txt": "9\n" * 8, "map_clsloc.txt": KIT}, "does not name number 9"),
        ({"imagenet_2012_validation_synset_labels.txt": "n7\n" * 8}, "'n7' is no class of train/ and no number from 0"),
        ({"imagenet_2012_validation_synset_labels.txt": "n1\n" * 8}, "class 'n0' of .*train is not in .*val"),
    ],
)
@pytest.mark.usefixtures("flat")
def test_files_that_do_not_fit_a_flat_val(files: dict[str, str], message: str, own: Path) -> None:
    for name, content in files.items():
        (own / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_data(str(own), Workers(0))
    assert "\n" not in str(error.value)
