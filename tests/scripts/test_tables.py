"""The tables of results: from records to pages, and reproduce.py, which trains their rows."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cifar10.recipes import RECIPES
from distill.config.recipe import Recipe
from distill.errors import UserError
from distill.losses import FEATURES, METHODS
from scripts import reproduce, results, tables

pytestmark = pytest.mark.usefixtures("home")


def test_the_tables_in_the_readme_are_those_of_the_records() -> None:
    assert results.main(["--check"]) == 0


def finished_run(
    directory: Path, recipe: Recipe, accuracy: float, content: str, epochs: int = 0, **other: object
) -> Path:
    """What a run leaves, as far as the tables read it; `epochs`: those of a run that was extended; `other` facts."""
    directory.mkdir(parents=True)
    init = "def" if "-finetuned-" in directory.name else None
    facts = {"data_digest": "123", "teacher_digest": "abc", "init_digest": init, "world_size": 1, **other}
    starts = [{"time": "now", "commit": "0123456789", "argv": ["/home/me/secret"]}]
    (directory / "config.json").write_text(
        json.dumps(
            {"recipe": {**recipe.to_dict(), "epochs": epochs or recipe.epochs}, "facts": facts, "starts": starts}
        )
    )
    taught = recipe.teacher_arch is not None
    summary = {
        "arch": recipe.arch,
        "teacher_arch": recipe.teacher_arch,
        "trained_by": recipe.trained_by,
        "formula": recipe.formula if taught else None,
        "agreement": 80.123 if taught else None,
        "teacher_accuracy": 95.0 if taught else None,
        "parameters": 1000,
        "test_accuracy": accuracy,
        "epochs": recipe.epochs,
        "wall_seconds": 12.4,
        "device": "cpu, 2 threads",
        "commit": "0123456789-dirty",
        "data_content": content,
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    return directory


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (results, tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def test_tables_from_records(records: Path, tmp_path: Path) -> None:
    """Means and deviations over seeds, differences, dashes for what is missing; a stale table is told."""
    runs = {"teacher-densenet40-seed0": 95.0, "student-seed0": 90.0, "student-seed1": 91.0}
    runs |= {f"student-kd-densenet40-seed{k}": 92 + 0.5 * k for k in range(3)}
    runs |= {"student-finetuned-seed0": 91.5}
    rows = tables.rows("cpu")
    for name, accuracy in runs.items():
        recipe = replace(rows[name[:-6]], seed=int(name[-1]), precision="float32")
        assert results.record("cpu", [finished_run(tmp_path / name, recipe, accuracy, tables.CIFAR10)])
    kept = (records / "cpu" / "student-kd-densenet40-seed0.json").read_text()
    assert (json.loads(kept)["teacher_digest"], json.loads(kept)["last_epoch"]) == ("abc", {"epoch": 2})
    assert "secret" not in kept
    lines = tables.accuracies("cpu")
    assert lines[2] == "| none: CE | | 90.50 +- 0.71 (90.67) |  |  | 91.50, n = 1 | 60 | 12 | 2 |"
    assert lines[3] == "| airbench94 | - | - | - | - | - | 30, 60 | -, - | - |"
    taught = "| densenet40 | 95.00 (92.26) | 92.50 +- 0.50 (91.63) | +2.00 | +2.50 | - | 40, 60 | 12, 12 | 3 |"
    assert lines[5] == taught
    assert lines[-1] == "Measured on: cpu, 2 threads; commits 0123456-dirty."
    assert tables.accuracies("full")[3] == "| resnet152 | - (92.41) | - (92.12) | - | - | - | 60, 300 | -, - | - |"
    begin, end = results.MARKERS
    (tmp_path / "checkpoints").mkdir()
    told = "| `efficientnet_b0-ce.pt` | CE | cifar10 | 93.00 % | 300 |\n"  # of another budget
    told += "| `efficientnet_b0-kd.pt` | KD from densenet40 | cifar10 | 92.50 % | 60 |\n"
    (tmp_path / "checkpoints" / "README.md").write_text(told)
    for page, names in results.PAGES.items():
        places = "".join(f"{begin.format(name)}\nold\n{end}\n" for name in names)
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n{places}after\n")
    assert results.main(["--check"]) == 1
    assert results.main([]) == 0
    assert results.main(["--check"]) == 0
    text = (tmp_path / "cifar10" / "README.md").read_text()
    assert taught in text
    assert (text.startswith("before\n"), text.endswith("\nafter\n"), "old" in text) == (True, True, False)
    front = (tmp_path / "README.md").read_text()
    assert "| CE | 90.50 +- 0.71 |  |  | 2 | 60 | 0.0 |  |" in front
    assert (
        "| +2.00 | 95.00 | 3 | 60 | 0.0 | [efficientnet_b0-kd.pt](checkpoints/published/efficientnet_b0-kd.pt) |"
        in front
    )
    assert "airbench94" not in front  # nobody was taught by it
    page = tmp_path / "distill" / "README.md"
    features = f"{begin.format('features')}\nold\n{end}\n"
    losses = features.replace("features", "losses")
    for wrong in ("no place", losses, losses.removesuffix(f"{end}\n") + features, losses * 2 + features):
        page.write_text(wrong)
        with pytest.raises(UserError, match=r"distill/README.md must have one line"):
            results.main([])
        assert page.read_text() == wrong
    assert (tmp_path / "README.md").read_text() == front
    (records / "cpu" / "student-seed7.json").write_text("{}")
    with pytest.raises(UserError, match=r"student-seed7.json is no record of a run"):
        tables.accuracies("cpu")


@pytest.mark.usefixtures("records")
def test_a_student_that_trains_longer(tmp_path: Path) -> None:
    """Its rows are compared with each other, below those of the others, and it needs the same teacher."""
    rows = tables.rows("cpu")
    names = ["student", "student-kd-airbench94", "student-150", "student-150-kd-airbench94"]
    assert [rows[name].epochs for name in names] == [60, 60, 150, 150]
    assert replace(rows["student-150-kd-airbench94"], epochs=60, sizes="24:36") == rows["student-kd-airbench94"]
    for name, accuracy in zip(names, (90.0, 92.0, 91.0, 94.0), strict=True):
        assert results.record("cpu", [finished_run(tmp_path / f"{name}-seed0", rows[name], accuracy, tables.CIFAR10)])
    lines = tables.accuracies("cpu")
    assert lines[3] == "| airbench94 | - | 92.00 | +2.00 | - | - | 30, 60 | -, 12 | 1 |"
    assert lines[-4:-2] == [
        "| none: CE; student of 150 epochs | | 91.00 |  |  | - | 150 | 12 | 1 |",
        "| airbench94; student of 150 epochs | - | 94.00 | +3.00 | - | - | 30, 150 | -, 12 | 1 |",
    ]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "README.md").write_text("no weights")
    assert [line.split(" | ")[1] for line in tables.results("cpu")[2:]] == ["90.00", "92.00", "91.00", "94.00"]
    pytest.importorskip("matplotlib")
    tables.draw(tmp_path / "figure.svg", "cpu")
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(f">{figure}<" in drawn for figure in ("90.00", "92.00", "91.00", "94.00"))
    assert "airbench94, 150 epochs" in drawn
    assert reproduce._wanted("student-150-kd-airbench94", rows, teachers=True) == [
        "teacher-airbench94",
        "student-150-kd-airbench94",
    ]


@pytest.mark.usefixtures("records")
def test_weights_are_chosen_on_held_out_images(tmp_path: Path) -> None:
    """The best weight on them gets a row of its own in the table of methods, once all have been tried."""
    rows = tables.rows("tuning")
    assert {name.rpartition("-x")[0] for name in rows} == {"kd", *METHODS, *FEATURES} - {"none"}
    assert all(recipe.val_split == 1000 for recipe in rows.values())
    assert [rows[f"at-x{factor}"].features.feature_weight for factor in ("0.1", "1", "10")] == [100, 1000, 10000]
    assert [rows[f"dist-x{factor}"].method.kd_weight for factor in ("0.1", "1", "10")] == [0.2, 2, 20]
    assert rows["kd-x1"].loss_weights == pytest.approx(tables.rows("methods")["kd"].loss_weights)
    tried = [("at", "0.1", 70.0), ("at", "1", 69.0), ("at", "10", 71.0)]
    tried += [("sp", "0.1", 70.0), ("sp", "1", 70.0), ("sp", "10", 70.0)]  # none is better than the authors'
    for method, factor, accuracy in tried:
        assert ("at-x10" in tables.rows("methods")) == (method == "sp")
        name = f"{method}-x{factor}-seed0"
        run = finished_run(tmp_path / name, replace(rows[name[:-6]], precision="float32"), 60.0, tables.SUBSET)
        (run / "metrics.jsonl").write_text(json.dumps({"epoch": 10, "val_accuracy": accuracy}) + "\n")
        assert results.record("tuning", [run])
    diverging = [("nst", "0.1", False), ("nst", "1", False), ("nst", "10", True)]  # it would have been the best
    diverging += [("pkt", factor, True) for factor in ("0.1", "1", "10")]
    for method, factor, diverges in diverging:
        name = f"{method}-x{factor}-seed0"
        run = finished_run(tmp_path / name, rows[name[:-6]], 60.0 + float(factor), tables.SUBSET)
        (run / "metrics.jsonl").write_text(json.dumps({"epoch": 10, "val_accuracy": 60.0 + float(factor)}) + "\n")
        if diverges:
            summary = json.loads((run / "summary.json").read_text()) | {"test_accuracy": None, "diverged": {"step": 7}}
            (run / "diverged.json").write_text(json.dumps(summary))
            for name in ("summary.json", "metrics.jsonl"):
                (run / name).unlink()
        assert results.record("tuning", [run])
    assert results.row(run)[1] == "diverged at step 7"
    assert "| `nst` | 60.10 | **61.00** | diverged |" in tables.tuning()
    assert "| `pkt` | diverged | diverged | diverged |" in tables.tuning()
    chosen = {name: recipe for name, recipe in tables.rows("methods").items() if "-x" in name}
    assert list(chosen) == ["at-x10"]
    assert chosen["at-x10"].features.feature_weight == 10000
    assert chosen["at-x10"].val_split == 0
    assert "| `at` | 70.00 | 69.00 | **71.00** |" in tables.tuning()
    assert "| `sp` | 70.00 | **70.00** | 70.00 |" in tables.tuning()


def test_the_figure_has_the_numbers_of_the_table() -> None:
    svg = (tables.ROOT / "docs" / "results.svg").read_text()
    for line in tables.results()[2:]:
        cells = line.split("|")
        for figure in re.findall(r"\d\d\.\d\d", cells[2] + cells[4]):
            assert f">{figure}<" in svg, "python scripts/results.py --figure docs/results.svg draws it anew"


@pytest.mark.usefixtures("records")
def test_a_figure_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="no student of the table cpu has been taught"):
        results.main(["--figure", str(tmp_path / "figure.svg")])


def test_what_is_not_recorded(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tables.rows("cpu")["student"]
    make = partial(finished_run, accuracy=90.0, content=tables.CIFAR10)
    for name, run in (
        (
            "is not finished",
            make(tmp_path / "a" / "student-seed0", student, epochs=120),
        ),
        ("ce-seed0 is no row of the table cpu", make(tmp_path / "ce-seed0", student)),
        ("student-seed0 has --seed 1", make(tmp_path / "b" / "student-seed0", replace(student, seed=1))),
        (
            "--epochs of student-seed0 is 37, the table's 60",
            make(tmp_path / "c" / "student-seed0", replace(student, epochs=37)),
        ),
        ("other data", finished_run(tmp_path / "d" / "student-seed0", student, 90.0, tables.SUBSET)),
        ("weights that were given", make(tmp_path / "e" / "student-seed0", student, init_digest="def")),
        ("batches in 4 parts", make(tmp_path / "f" / "student-seed0", student, world_size=4)),
    ):
        assert not results.record("cpu", [run])
        assert name in capsys.readouterr().out
    assert not records.exists()
    pretrained = tables.rows("cpu")["teacher-efficientnet-lite0"]
    run = make(tmp_path / "teacher-efficientnet-lite0-seed0", pretrained, init_digest="of ImageNet's weights")
    assert results.record("cpu", [run])
    taught = tables.rows("cpu")["student-kd-densenet40"]
    assert results.record("cpu", [make(tmp_path / "student-kd-densenet40-seed0", taught)])
    assert not results.record(
        "cpu", [make(tmp_path / "student-kd-densenet40-seed1", replace(taught, seed=1), teacher_digest="other")]
    )
    assert "student-kd-densenet40-seed1 was taught by another densenet40 than the runs in" in capsys.readouterr().out
    cut = make(tmp_path / "g" / "student-seed0", student)
    (cut / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="is not what a run leaves"):
        results.record("cpu", [cut])
    for wrong, message in (
        ("huge", "--record must be one of full, cpu, methods, tuning"),
        ("cpu", "is no directory of a run"),
    ):
        with pytest.raises(UserError, match=message):
            results.main(["--record", wrong, str(tmp_path)])


@pytest.mark.usefixtures("records")
def test_the_table_of_methods(tmp_path: Path) -> None:
    rows = tables.rows("methods")
    assert tables.methods()[2:] == [
        *(f"| `{name}` |  |  | - | - | - | - |" for name in rows),
        "",
        "Measured on: nothing yet.",
    ]
    for name, seed, accuracy in (("ce", 0, 50.0), ("nkd", 0, 53.0), ("nkd", 1, 54.0)):
        run = tmp_path / f"{name}-seed{seed}"
        assert results.record("methods", [finished_run(run, replace(rows[name], seed=seed), accuracy, tables.SUBSET)])
    used = "gamma = 3.5, T = 3, kd_weight = 1, ce_weight = 1"
    nkd = f"| `nkd` | NKD from densenet40 | {used} | 53.50 +- 0.71 | +3.50 | 80.12 | 2 |"
    assert tables.methods()[2:4] == [nkd, "| `ce` | CE |  | 50.00 |  |  | 1 |"]
    record = tables.RECORDS / "methods" / "ce-seed0.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"test_accuracy": None}))
    assert tables.methods()[2] == nkd.replace("+3.50", "-")
    assert "| `ce` |  |  | diverged | - | - | 1 |" in tables.methods()


def test_a_list_of_runs_says_where_teachers_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kd = tables.rows("methods")["kd"]
    runs = [finished_run(tmp_path / name, kd, 50.0, "x", teacher_digest=name) for name in ("one", "two")]
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "lock").touch()
    results.main([str(path) for path in (*runs, tmp_path / "refused")])
    said, noted = capsys.readouterr()
    assert said.count("50.00 %") == 2
    assert said.endswith("note: these students were not all taught by the same densenet40\n")
    assert noted == f"note: left out, since nothing was saved in them: {tmp_path / 'refused'}\n"
    results.main([str(runs[0])])
    assert "note" not in capsys.readouterr().out


def test_methods_differ_in_nothing_but_the_method() -> None:
    for table in ("long_student_kd", "student_kd"):
        rows = tables.by_method(RECIPES[table])
        kept = [
            {**recipe.to_dict(), **dict.fromkeys(("method", "features", "teacher_arch"))} for recipe in rows.values()
        ]
        assert all(recipe == kept[0] for recipe in kept)
        assert len({recipe.formula for name, recipe in rows.items() if name != "ce"}) == len(rows) - 1
    assert tables.by_method(RECIPES["short_student_kd"])["ce"] == RECIPES["short_student"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("cifar100",), "--table must be one of cifar10, methods, tuning, got 'cifar100'"),
        (("cifar10", "--budget=huge"), "--budget must be one of full, cpu, got 'huge'"),
        (("cifar10", "--seeds", "0"), "--seeds must be an integer, at least 1, got 0"),
        (("cifar10", "--only", "teacher-vgg"), "--only must be of teacher-resnet152, teacher-densenet40"),
        (("methods", "--only", ""), "--only must be text, got ''"),
        (("methods", "--only", "kd,,ce"), "--only must be of ce, kd, kd-T1"),
        (("methods", "--seed=3", "--seeds=2"), "--seed N is one seed, --seeds N are the seeds 0 to N - 1"),
        (("methods", "--fresh"), "--fresh is for one run, not for this table"),
        (("cifar10", "--teacher-arch=resnet18"), "--teacher-arch is for one run, not for this table"),
        (("cifar10", "--teacher-checkpoint", "x.pt"), "--teacher-checkpoint must be 'published' for this table"),
        (("cifar10", "--lr", "x"), "--lr must be a number"),
        (("cifar10", "--teacher-checkpoint=published"), "--teacher-checkpoint published: there is none of resnet152"),
        (
            ("methods", "--recipe=short_student", "--teacher-checkpoint=published"),
            "--teacher-checkpoint published: there is none of resnet18",
        ),
        (("methods", "--mixup"), "--method dkd wants one label for each image"),
    ],
)
def test_mistakes_of_reproduce(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        reproduce.main(flags)


def test_a_seed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main(["cifar10", "--budget=cpu", "--only=student-kd-airbench94", "--seed=2", "--show-recipe"])
    shown, noted = capsys.readouterr()
    assert [(run["run"], run["seed"]) for run in json.loads(shown)] == [
        ("teacher-airbench94-seed0", 0),
        ("student-kd-airbench94-seed2", 2),
    ]
    assert not noted


@pytest.mark.slow
def test_reproduce_trains_what_a_row_needs(small_npz: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["cifar10", "--budget", "cpu", "--only", "student-kd-airbench94-finetuned", "--data", str(small_npz)]
    flags += ["--batch-size=20", "--epochs", "2", "--sizes", "28:1", "--seeds", "1", "--precision", "float32"]
    reproduce.main(flags)
    said, noted = capsys.readouterr()
    names = ["teacher-airbench94-seed0", "student-seed0", "student-kd-airbench94-finetuned-seed0"]
    assert [line.removeprefix("== ") for line in said.splitlines() if line.startswith("==")] == names
    assert noted.count("note: --epochs of teacher-airbench94-seed0 is 2, the table's 30") == 1
    assert said.count("not recorded: ") == 3
    assert said.count(": epochs left 2, about ") == 3
    assert said.count("together about ") == 1
    assert sorted(path.name for path in (home / "cifar10-cpu").iterdir()) == sorted(names)
    configs = [json.loads((home / "cifar10-cpu" / name / "config.json").read_text()) for name in names]
    assert [(c["recipe"]["arch"], c["recipe"]["lr"]) for c in configs] == [
        ("airbench94", 0.2),
        ("efficientnet_b0", 0.1),
        ("efficientnet_b0", 0.02),
    ]
    reproduce.main(flags)
    said = capsys.readouterr().out
    assert (said.count("finished before"), said.count("epochs left")) == (3, 0)
    reproduce.main([*flags, "--show-recipe"])
    shown, noted = capsys.readouterr()
    assert [run["run"] for run in json.loads(shown)] == names
    assert noted.count("note: --epochs of teacher-airbench94-seed0 is 2, the table's 30") == 1
    flags[flags.index("student-kd-airbench94-finetuned")] = "student-kd-densenet40"
    reproduce.main([*flags, "--show-recipe", "--teacher-checkpoint", "published"])
    assert [run["run"] for run in json.loads(capsys.readouterr().out)] == ["student-kd-densenet40-seed0"]


@pytest.mark.slow
def test_reproduce_trains_each_method(flags: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags += ["--batch-size", "20", "--arch", "airbench94", "--epochs", "1", "--only", "ce,kd-T1", "--seeds", "2"]
    reproduce.main(["methods", *flags])
    said = capsys.readouterr().out
    names = ["ce-seed0", "kd-T1-seed0", "ce-seed1", "kd-T1-seed1"]
    assert [line.removeprefix("== ") for line in said.splitlines() if line.startswith("==")] == names
    recipes = [json.loads((home / "methods" / name / "config.json").read_text())["recipe"] for name in names]
    assert [(r["teacher_arch"], r["method"] and r["method"]["kd_weight"], r["seed"]) for r in recipes] == [
        (None, None, 0),
        ("airbench94", 3.0, 0),
        (None, None, 1),
        ("airbench94", 3.0, 1),
    ]
    reproduce.main(["methods", *flags, "--lr", "1e30", "--runs", str(home / "far")])
    said = capsys.readouterr().out
    assert said.count("the loss or its gradient is not finite at step") == 4
    assert len(re.findall(r"^\S+-seed[01] +diverged at step \d", said, flags=re.MULTILINE)) == 4
    summary = json.loads((home / "far" / "ce-seed0" / "diverged.json").read_text())
    assert (summary["arch"], summary["test_accuracy"], set(summary["diverged"])) == ("airbench94", None, {"step"})
