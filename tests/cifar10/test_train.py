"""The entry scripts from end to end on a little data: teacher, student, evaluation, and the foreign files they meet."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from cifar10 import models, task, train_ce, train_kd
from cifar10.data import load_data
from cifar10.models import MODELS
from cifar10.recipes import RECIPES
from distill.config.recipe import Options
from distill.errors import UserError
from distill.files import checkpoint
from distill.losses import METHODS, kd_loss
from distill.models import weights
from distill.training import objectives
from scripts import evaluate, results
from tests.conftest import teacher_file, without_first

CE = replace(RECIPES["student"], epochs=2, batch_size=8)
KD = replace(CE, teacher_arch="densenet_cifar", method=kd_loss.KD())
OURS = str(task.PUBLISHED / "densenet40-ce.pt")


@pytest.mark.slow
def test_kd_trains_its_teacher_first(home: Path, small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train_kd.train(KD, Options(data=str(small_npz)))
    said = capsys.readouterr().out
    assert "densenet_cifar has no finished run on small: it is trained first by CE, 2 epochs" in said
    assert "Cheaper: " in said
    assert "loss = w * T^2 * KL" in said
    assert summary is not None
    run = home / "small" / "efficientnet_b0" / "kd-densenet_cifar-T3-w0.8-seed0"
    assert json.loads((run / "summary.json").read_text()) == summary
    expected = {
        "arch",
        "teacher_arch",
        "objective",
        "method",
        "features",
        "seed",
        "view_seed",
        "data",
        "augment",
        "views",
        "epochs",
    }
    expected |= {"test_accuracy", "teacher_accuracy", "agreement", "parameters", "train_images_per_second"}
    assert expected | {"wall_seconds", "precision", "device", "torch", "commit"} <= set(summary)
    again = train_kd.train(KD, Options(data=str(small_npz)))
    said = capsys.readouterr().out
    assert again == summary
    assert "trained first" not in said
    assert "finished before" in said


@pytest.mark.slow
def test_the_student_does_not_depend_on_who_trained_the_teacher(home: Path, small_npz: Path, tmp_path: Path) -> None:
    """A teacher trained in the same process and one from a file give the same student, bit for bit."""
    recipe = replace(KD, epochs=1)
    train_kd.train(recipe, Options(data=str(small_npz), output=str(tmp_path / "a")))
    teacher = home / "small" / "densenet_cifar" / "ce-seed0" / "last.pt"
    train_kd.train(recipe, Options(data=str(small_npz), output=str(tmp_path / "b"), teacher_checkpoint=str(teacher)))
    students = [checkpoint.load(tmp_path / name / "last.pt")["student"] for name in "ab"]
    assert checkpoint.digest(students[0]) == checkpoint.digest(students[1])


@pytest.mark.slow
def test_a_cut_teacher_is_finished_first(home: Path, small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="stopped after 3 steps"):
        train_kd.train(replace(KD, epochs=1), Options(data=str(small_npz), steps=3))
    assert not list((home / "small" / "efficientnet_b0").rglob("*.pt"))
    train_kd.train(replace(KD, epochs=1), Options(data=str(small_npz)))
    assert "continuing at epoch 1, step 3" in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_a_teacher_of_other_classes_is_refused(small_npz: Path, tmp_path: Path) -> None:
    options = Options(data=str(small_npz), teacher_checkpoint=teacher_file(tmp_path / "t.pth", classes=10))
    with pytest.raises(UserError, match="number of classes"):
        train_kd.train(KD, options)


@pytest.mark.slow
def test_a_teacher_of_other_data_is_passed_by(home: Path, small_npz: Path, tmp_path: Path) -> None:
    """The data may have changed under the same name: the teacher of the new data stands beside the old one."""
    train_ce.train(replace(CE, arch="densenet_cifar", epochs=1), Options(data=str(small_npz)))
    arrays = dict(np.load(small_npz))
    np.savez(tmp_path / "small.npz", **{**arrays, "train_images": 255 - arrays["train_images"]})
    options = Options(data=str(tmp_path / "small.npz"))
    train_kd.train(replace(KD, epochs=1), options)
    assert sorted(p.name for p in (home / "small" / "densenet_cifar").iterdir()) == ["ce-seed0", "ce-seed0-2"]
    with pytest.raises(UserError, match="efficientnet_b0 stopped after 1 steps"):
        train_kd.train(KD.with_flags({"epochs": 1, "T": 4.0}), replace(options, steps=1))
    assert len(list((home / "small" / "densenet_cifar").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_teacher_that_saw_the_validation_images(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_ce.train(replace(CE, arch="densenet_cifar", epochs=1), Options(data=str(small_npz)))
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(replace(KD, epochs=1, val_split=8), Options(data=str(small_npz), steps=1))
    assert "warning: the teacher may have seen images of the validation part" in capsys.readouterr().out


def test_weak_teacher_is_warned_about(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = teacher_file(tmp_path / "t.pth")
    options = Options(data=str(small_npz), teacher_checkpoint=teacher, output=str(tmp_path / "run"), steps=1)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(KD, options)
    assert "near chance (25.00 %)" in capsys.readouterr().out


@pytest.mark.slow
def test_init_starts_from_the_weights(small_npz: Path, tmp_path: Path) -> None:
    train_ce.train(CE, Options(data=str(small_npz), output=str(tmp_path / "first")))
    named = str(tmp_path / "first" / "last.pt")
    options = Options(data=str(small_npz), output=str(tmp_path / "tuned"), init=named)
    train_ce.train(replace(CE, lr=1e-9, epochs=1), options)
    before, after = (weights.load(tmp_path / run / "last.pt").state for run in ("first", "tuned"))
    torch.testing.assert_close(after["linear.weight"], before["linear.weight"], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"--init \(init_digest\) was"):
        train_ce.train(replace(CE, lr=1e-9, epochs=1), replace(options, init=None))


def test_evaluate_flag(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(data=str(small_npz), output=str(tmp_path / "run"))
    summary = train_ce.train(CE, options)
    assert summary is not None
    found = train_ce.train(CE, replace(options, evaluate=True))
    assert found is not None
    assert found["accuracy"] == summary["test_accuracy"]
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"accuracy {found['accuracy']:.2f} %  top-5 100.00 %")
    assert f"evaluating {tmp_path / 'run' / 'last.pt'}" in said
    with pytest.raises(UserError, match="holds another run: --lr was"):
        train_ce.train(replace(CE, lr=0.5), replace(options, evaluate=True))
    file = str(tmp_path / "run" / "last.pt")
    assert train_ce.train(CE, replace(options, evaluate=True, output=None, init=file)) is not None
    assert f"evaluating {file}\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "original", "bare"])
def test_evaluate_script(
    command: Any, small_npz: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Called once as a user does: a process takes seconds to start."""
    weights = MODELS.build("densenet_cifar", 4).state_dict()
    file = tmp_path / "ckpt.pth"
    if name == "ours":
        checkpoint.save(file, {"student": weights, "epoch": 3})
    else:
        wrapped = {"net": {f"module.{k}": v for k, v in weights.items()}, "acc": 92.4, "epoch": 3}
        torch.save(wrapped if name == "original" else weights, file)
    given = ("--arch", "densenet_cifar", "--checkpoint", file, "--data", small_npz, "--json", tmp_path / "found.json")
    flags = list(map(str, given))
    if name == "ours":
        found = command("scripts/evaluate.py", *flags)
        assert found.returncode == 0, found.stderr
        said = found.stdout
    else:
        evaluate.main(flags)
        said = capsys.readouterr().out
    values = json.loads((tmp_path / "found.json").read_text())
    assert set(values) == {"accuracy", "top5", "loss", "images", "images_per_second"}
    last = said.splitlines()[-1]
    assert last.startswith(f"accuracy {values['accuracy']:.2f} %  top-5 {values['top5']:.2f} %  loss ")
    assert values["images"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint is needed"),
        (["--arch", "resnet18", "--checkpoint", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--checkpoint", "x", "--json", "nowhere/x.json"], "--json nowhere/x.json: there is no such directory"),
        (["--split", "val", "--checkpoint", OURS], "--split val: cifar10 has test and train"),
        (["--weights", "IMAGENET1K_V2", "--checkpoint", OURS], "--weights must be one of raw, ema for small images"),
        (["--std", "0.5", "--checkpoint", OURS], "--mean and --std belong together"),
    ],
)
def test_evaluate_script_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate.main(flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.slow
def test_a_mistake_of_the_evaluate_script_is_one_line(command: Any) -> None:
    found = command("scripts/evaluate.py", "--arch", "resnet18", "--checkpoint", "nowhere.pt")
    assert found.returncode == 2
    assert found.stderr.startswith("error: nowhere.pt does not exist")
    assert found.stderr.count("\n") == 1


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("seconds", "advice"),
    [
        (
            {"densenet_cifar": 360.0, "airbench94": 90.0},
            "about 8.0 h. Cheaper: --teacher-arch airbench94 --arch efficientnet_b0, about 2.0 h",
        ),
        ({"densenet_cifar": 9.0, "airbench94": 90.0}, "about 12 min. Cheaper: fewer --epochs."),
    ],
)
def test_a_cheaper_pair_is_suggested(
    small_npz: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[str, float],
    advice: str,
) -> None:
    assert all(MODELS.resolve(arch) == arch for arch in task.CHEAP)
    monkeypatch.setattr(task, "training_seconds", lambda recipe, *_: 80 * seconds[recipe.arch])
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(KD, Options(data=str(small_npz), steps=1))
    assert advice in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_a_network_starts_from_images_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data may come class by class; here class k has images of the gray value k."""
    monkeypatch.setattr(task, "EXAMPLES", 10)
    labels = np.repeat(np.arange(5), 7)
    images = np.broadcast_to(labels[:, None, None, None], (35, 32, 32, 3)).astype(np.uint8)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "data.npz", **arrays)
    given: list[torch.Tensor] = []
    build = models.build_student

    def note(*args: Any) -> Any:
        given.append(args[-1])
        return build(*args)

    monkeypatch.setattr(models, "build_student", note)
    recipe = replace(RECIPES["student"], arch="airbench94", epochs=1, batch_size=8, dropout=0.0, drop_connect=0.0)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(recipe, Options(data=str(tmp_path / "data.npz"), steps=1))
    assert given[0][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_trained_teacher_of_the_same_classes_is_suggested() -> None:
    classes = load_data("sample").classes
    flags = ", or take trained ones by --teacher-arch {} --teacher-checkpoint published"
    assert task.ready_teacher("resnet152", classes) == flags.format("airbench94")
    assert task.ready_teacher("densenet40", classes) == flags.format("densenet40")
    assert task.ready_teacher("densenet40", classes[::-1]) == ""


def test_training_seconds(small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "seconds_per_image", lambda *_: 0.5)
    recipe = replace(CE, arch="densenet_cifar", epochs=3)
    data, cpu = load_data(str(small_npz)), torch.device("cpu")
    assert task.training_seconds(recipe, data, cpu) == 3 * 40 * 0.5
    assert task.training_seconds(replace(recipe, sizes="16:2"), data, cpu) == (2 / 4 + 1) * 40 * 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_teacher_of_another_recipe_is_told(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_ce.train(replace(CE, arch="densenet_cifar", epochs=1), Options(data=str(small_npz)))
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(KD, Options(data=str(small_npz), steps=1))
    assert "has a recipe of its own: --epochs 1 for 2" in capsys.readouterr().out


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"top_k": 3, "teacher_weights": "IMAGENET1K_V1"},
            {},
            "IMAGENET1K_V1 is a name for ImageNet's",
        ),
        ({"top_k": 4}, {}, "--top-k 4 must be less than the 4 classes"),
        ({"sync_bn": True}, {}, "--sync-bn takes CUDA"),
        ({}, {"resume": "nowhere.pt"}, "cannot read nowhere.pt"),
        ({"method": METHODS["dist"](), "batch_size": 2}, {}, "--method dist correlates across the images of a process"),
        ({"val_split": 40}, {}, "--batch-size 8 is more than the 40 training images less 40 of --val-split$"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_teacher_is_trained(
    small_npz: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(task.SmallImages, "_trained", Mock(side_effect=AssertionError("a teacher is trained")))
    if "batch_size" in changes:  # a process has one image of a batch
        monkeypatch.setattr(objectives, "world_size", lambda: 2)
    recipe = replace(KD, arch="airbench94", dropout=0.0, drop_connect=0.0, **changes)
    with pytest.raises(UserError, match=message):
        train_kd.train(recipe, Options(data=str(small_npz), **options))


@pytest.mark.usefixtures("home")
def test_an_unfinished_teacher_is_told(small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = replace(CE, arch="densenet_cifar")
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(teacher, Options(data=str(small_npz), output=str(tmp_path / "teacher"), steps=1))
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(KD, Options(data=str(small_npz), teacher_checkpoint=str(tmp_path / "teacher"), steps=1))
    assert "warning: the teacher is of the run" in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_mistakes_are_told_before_the_teacher_is_trained(small_npz: Path, tmp_path: Path) -> None:
    options = Options(data=str(small_npz), output=str(tmp_path / "run"))
    train_ce.train(CE, options)
    with pytest.raises(UserError, match="holds another run: --teacher-arch was None"):
        train_kd.train(KD, options)


@pytest.mark.slow
def test_a_finished_run_needs_its_teacher_no_more(home: Path, small_npz: Path) -> None:
    recipe = replace(KD, epochs=1)
    summary = train_kd.train(recipe, Options(data=str(small_npz)))
    shutil.rmtree(home / "small" / "densenet_cifar")
    assert train_kd.train(recipe, Options(data=str(small_npz))) == summary


@pytest.mark.slow
def test_evaluate_script_knows_the_network_of_our_files(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(CE, arch="densenet_cifar", val_split=8)
    summary = train_ce.train(recipe, Options(data=str(small_npz), output=str(tmp_path / "run")))
    assert summary is not None
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    best = max(lines, key=lambda line: line["val_accuracy"])
    for name, accuracy in (("last.pt", summary["test_accuracy"]), ("best.pt", best["test_accuracy"])):
        evaluate.main(["--checkpoint", str(tmp_path / "run" / name), "--data", str(small_npz)])
        assert f"accuracy {accuracy:.2f} %" in capsys.readouterr().out


@pytest.mark.slow
def test_results_script(command: Any, small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(CE, arch="airbench94", epochs=1, dropout=0.0, drop_connect=0.0)
    train_ce.train(recipe, Options(data=str(small_npz), output=str(tmp_path / "done")))
    with pytest.raises(UserError, match="airbench94 stopped after 1 steps"):
        train_ce.train(recipe, Options(data=str(small_npz), output=str(tmp_path / "cut"), steps=1))
    found = command("scripts/results.py", tmp_path / "done", tmp_path / "cut")
    assert found.returncode == 0, found.stderr
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["run", "done", "cut"]
    assert "not finished" in found.stdout
    options = Options(
        data=str(small_npz), output=str(tmp_path / "kd"), teacher_checkpoint=teacher_file(tmp_path / "t.pth")
    )
    train_kd.train(replace(KD, arch="airbench94", epochs=1), options)
    capsys.readouterr()
    assert results.main([str(tmp_path / "kd")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["the", "teacher", "densenet_cifar"]
    with pytest.raises(UserError) as error:
        results.main([str(tmp_path)])
    assert error.value.exit_code == 2


def test_unlabelled_images_are_taught_by_the_teacher_alone(home: Path, tmp_path: Path) -> None:
    """train/*.png without classes: w = 1, a teacher from a file; no accuracy where there are no labels."""
    root, sample = tmp_path / "shots", load_data("sample")
    (root / "train").mkdir(parents=True)
    for i in range(0, 2000, 100):
        Image.fromarray(sample.train_images[i].numpy()).save(root / "train" / f"{i}.png")
    for i in range(0, 1000, 50):
        folder = root / "test" / sample.classes[sample.test_labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.test_images[i].numpy()).save(folder / f"{i}.png")
    options = Options(data=str(root), teacher_checkpoint=teacher_file(tmp_path / "teacher.pth", 10))
    recipe = KD.with_flags({"epochs": 1, "w": 1.0})
    summary = train_kd.train(recipe, options)
    assert summary is not None
    assert (home / "shots").is_dir()
    record = json.loads(next(home.rglob("metrics.jsonl")).read_text())
    assert record["train_accuracy"] is None
    assert record["train_loss"] == record["train_kd"]
    assert record["test_accuracy"] == summary["test_accuracy"]
    assert "train_ce" not in record
    for wrong in (recipe.with_flags({"w": 0.9}), replace(recipe, val_split=5)):
        with pytest.raises(UserError, match="have no labels"):
            train_kd.train(wrong, options)
    with pytest.raises(UserError, match="have no labels"):
        train_ce.train(replace(CE, epochs=1), Options(data=str(root)))
    with pytest.raises(UserError, match="no labels to train a teacher with"):
        train_kd.train(replace(recipe, seed=1), Options(data=str(root)))
    (root / "train" / "cat").mkdir()
    Image.fromarray(sample.train_images[0].numpy()).save(root / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match="class folders and images beside them"):
        load_data(str(root))


def shuffled_classes(source: Path, target: Path) -> str:
    arrays = dict(np.load(source))
    np.savez(target, **{**arrays, "classes": np.roll(arrays["classes"], 1)})
    return str(target)


@pytest.mark.usefixtures("home")
def test_a_start_that_trains_nothing_changes_nothing(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong --extend that is killed, images that the checkpoint refuses: the first command continues the run."""
    recipe = replace(CE, arch="airbench94", epochs=2)
    options = Options(data=str(small_npz), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(recipe, replace(options, steps=1))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("distill.training.engine.Trainer.train_epoch", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_ce.train(replace(recipe, epochs=3000), replace(options, extend=True))
    other = shuffled_classes(small_npz, tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"is of a run on the classes .*, not "):
        train_ce.train(recipe, replace(options, data=other, allow_data_change=True))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    summary = train_ce.train(recipe, options)
    assert summary is not None
    assert (summary["epochs"], summary.get("data_changes")) == (2, None)
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["starts"]) == 2


@pytest.mark.usefixtures("home")
def test_a_memory_of_the_images_wants_the_same_images(small_npz: Path, tmp_path: Path) -> None:
    recipe = replace(CE, arch="airbench94", teacher_arch="airbench94", method=kd_loss.KD())
    recipe = recipe.with_flags({"features": "crd", "negatives": 4, "method": "none"})
    options = Options(
        data=str(small_npz),
        output=str(tmp_path / "run"),
        teacher_checkpoint=teacher_file(tmp_path / "t.pth", arch="airbench94"),
    )
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(recipe, replace(options, steps=1))
    fewer = without_first(small_npz, tmp_path / "fewer.npz")
    changed = replace(options, data=fewer, allow_data_change=True)
    with pytest.raises(UserError, match=r"data_digest was .*; --fresh or another --output") as error:
        train_kd.train(recipe, changed)
    assert "--allow-data-change" not in str(error.value)


@pytest.mark.usefixtures("home")
def test_a_teachers_run_that_does_not_serve(small_npz: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that has diverged is no teacher to be trained on; one of another version is named and left out."""
    recipe = replace(KD, arch="airbench94", teacher_arch="airbench94", epochs=1)
    options = Options(data=str(small_npz))
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(replace(CE, arch="airbench94", epochs=1), replace(options, steps=1))
    run = home / "small" / "airbench94" / "ce-seed0"
    (run / "diverged.json").write_text("{}")
    with pytest.raises(UserError, match=r"the teacher's run .*ce-seed0 has diverged: train one by trainCE\.sh"):
        train_kd.train(recipe, options)
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["of_yesterday"] = 1
    (run / "config.json").write_text(json.dumps(config))
    assert train_kd.train(recipe, options) is not None
    assert f"note: {run} is left out: the recipe " in capsys.readouterr().out


def test_a_teacher_is_computed_in_the_students_parts() -> None:
    recipe = replace(KD, teacher_arch="resnet152", batch_size=1024, accumulate=8)
    assert task.teacher_recipe(recipe).accumulate == 8
    large = task.teacher_recipe(replace(recipe, teacher_arch="efficientnet-lite0", batch_size=96, accumulate=3))
    assert (large.batch_size, large.accumulate) == (63, 3)


def test_of_several_runs_of_a_teacher_the_longest_teaches(
    small_npz: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has begun keeps its own, though another one was trained since."""
    options = Options(data=str(small_npz))
    short = replace(CE, arch="airbench94", epochs=1)
    train_ce.train(short, options)
    kd = replace(KD, arch="airbench94", teacher_arch="airbench94", epochs=3)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(kd, replace(options, steps=1))
    train_ce.train(replace(short, epochs=2), replace(options, fresh=True))
    capsys.readouterr()
    assert train_kd.train(kd, options) is not None
    assert "airbench94/ce-seed0/last.pt" in capsys.readouterr().out
    taught = json.loads((home / "small" / "airbench94" / kd.run_name / "config.json").read_text())
    assert taught["facts"]["teacher_digest"] == task._digest_of(home / "small" / "airbench94" / "ce-seed0")
    assert train_kd.train(kd.with_flags({"T": 5.0, "w": 0.5, "epochs": 1}), options) is not None
    assert "airbench94/ce-seed0-2/last.pt" in capsys.readouterr().out
    given = replace(options, output=str(tmp_path / "run"), teacher_checkpoint=teacher_file(tmp_path / "t.pth"))
    train_kd.train(replace(KD, arch="airbench94", epochs=1), given)
    train_kd.train(replace(KD, arch="airbench94", epochs=1), replace(given, teacher_checkpoint=None))
    assert f"note: it was taught by --teacher-checkpoint {given.teacher_checkpoint}" in capsys.readouterr().out


def test_init_published_is_the_file_of_the_networks_name(small_npz: Path) -> None:
    options = Options(data=str(small_npz), init="published")
    with task.SmallImages(replace(CE, arch="airbench94"), options) as images:
        assert images.build_student().init_digest
    with (
        task.SmallImages(replace(CE, arch="resnet18"), options) as images,
        pytest.raises(UserError, match="--init published: there is none of resnet18, but of airbench94"),
    ):
        images.build_student()


@pytest.mark.usefixtures("home")
def test_evaluate_takes_a_run_with_its_images(
    small_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    summary = train_ce.train(replace(CE, arch="airbench94", epochs=1), Options(data=str(small_npz), output=run))
    assert summary is not None
    for words in ([run], ["--checkpoint", f"{run}/last.pt"]):
        evaluate.main([*words, "--batch-size", "20"])
        assert f"accuracy {summary['test_accuracy']:.2f} %" in capsys.readouterr().out
    (tmp_path / "hub").mkdir()
    shutil.copy(f"{run}/last.pt", tmp_path / "hub" / "weights.pt")
    (tmp_path / "hub" / "config.json").write_text('{"architecture": "resnet18"}')  # as of a model hub
    evaluate.main([str(tmp_path / "hub" / "weights.pt"), "--data", str(small_npz)])
    assert f"accuracy {summary['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_too_large_a_batch_names_one_that_fits(small_npz: Path, tmp_path: Path) -> None:
    options = Options(data=str(small_npz), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"40 training images; try --batch-size 8 --lr 0\.00625$"):
        train_ce.train(replace(CE, arch="airbench94", batch_size=128, lr=0.1), options)


@pytest.mark.usefixtures("home")
def test_teachers_that_cannot_be_trained_here(small_npz: Path, tmp_path: Path) -> None:
    """A begun run that this command cannot go on with; a student that other weights have taught."""
    options = Options(data=str(small_npz))
    kd = replace(KD, arch="airbench94", teacher_arch="airbench94", epochs=1)
    given = replace(options, output=str(tmp_path / "run"), steps=1)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_kd.train(kd, replace(given, teacher_checkpoint=teacher_file(tmp_path / "t.pth", arch="airbench94")))
    with pytest.raises(UserError, match="was taught by other weights than those that would be trained now: give the"):
        train_kd.train(kd, given)
    with pytest.raises(UserError, match="stopped after 1 steps"):
        train_ce.train(replace(CE, arch="airbench94"), replace(options, init="published", steps=1))
    with pytest.raises(UserError, match=r"^the teacher's run: .*\(init_digest\) was .*; finish it by trainCE\.sh"):
        train_kd.train(kd, options)
