"""The scripts beside training: filling and keeping stores, a sweep, the benchmark."""

import copy
import hashlib
import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifar10 import task, train_ce, train_kd
from cifar10.models import CIFAR_INPUT
from cifar10.recipes import RECIPES
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.losses import FEATURES, METHODS
from distill.models.classifier import Classifier
from scripts import benchmark, model_size, precompute, publish, reproduce, results, sweep, tables
from tests.conftest import teacher_file

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def flags(small_npz: Path, tmp_path: Path) -> list[str]:
    teacher = teacher_file(tmp_path / "teacher.pth", arch="airbench94")  # the fastest there is
    return ["--data", str(small_npz), "--teacher-arch", "airbench94", "--teacher-checkpoint", teacher]


@pytest.mark.slow
def test_precompute_fills_what_training_reads(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert precompute.main([*flags, "--views", "2"]) == 0
    assert "80 views are in" in capsys.readouterr().out
    assert precompute.main([*flags, "--views", "3"]) == 0
    said = capsys.readouterr().out
    assert "view 2 of 3: 0 computed by this call" in said
    assert "120 views are in" in said
    assert "40 of them computed by this call" in said
    train_kd.main([*flags, "--arch", "airbench94", "--epochs", "3", "--batch-size", "8"])
    assert "teacher: 0 views computed, 120 were in the store" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", [["--method", "dist"], ["--overhaul"], ["--kd-weight", "9", "--ce-weight", "0.1"]])
def test_answers_do_not_depend_on_the_method(
    method: list[str], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    precompute.main([*flags, "--views", "1"])
    capsys.readouterr()
    assert precompute.main([*flags, "--views", "1", *method]) == 0
    assert "0 of them computed by this call" in capsys.readouterr().out
    with pytest.raises(UserError, match="a sweep goes through --T and --w of --method kd"):
        sweep.main([*flags, *method])


@pytest.mark.slow
def test_stores_are_listed_verified_and_removed(
    flags: list[str], home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert precompute.main(["--list"]) == 0
    assert capsys.readouterr().out == "there are no stores\n"
    precompute.main([*flags, "--views", "2"])
    capsys.readouterr()
    precompute.main(["--list"])
    shown = capsys.readouterr().out
    name = shown.split(":")[0]
    assert re.search(r"^airbench94-\w{16}: [\d.]+ kB, 2 views, 80 answers\n  \{.*crop_flip", shown)
    assert precompute.main([*flags, "--verify", "30"]) == 0
    assert (
        "30 answers asked again: 30 the same to the bit, the others differ by 0 of the largest"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="there is no store 'x'"):
        precompute.main(["--prune", "x"])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="--yes removes without asking"):
        precompute.main(["--prune", name])
    for answer, left in (("n\n", True), ("y\n", False)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        precompute.main(["--prune", name])
        assert (home / "stores" / name).exists() == left


@pytest.mark.slow
def test_verify_finds_a_wrong_answer(flags: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole files with other numbers in them: only asking again can tell."""
    from distill.files import checkpoint

    precompute.main([*flags, "--views", "1"])
    (path,) = (home / "stores").glob("*/0*.pt")
    segment = checkpoint.load(path)
    segment["rows"][3] += 1
    checkpoint.save(path, segment)
    assert precompute.main([*flags, "--verify", "40"]) == 1
    assert "40 answers asked again: 39 the same" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe", None])
def test_a_damaged_key_is_named_in_the_list(
    content: bytes | None, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = home / "stores" / "pets-resnet18-0123"
    store.mkdir(parents=True)
    for name in ("00007-3-0abc.pt", "0000x-3-0abc.pt", "00007-y-0abc.pt"):
        (store / name).write_bytes(b"1234")
    if content is None:
        (store / "key.json").mkdir()
    else:
        (store / "key.json").write_bytes(content)
    assert precompute.main(["--list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "pets-resnet18-0123: 4 B, 1 views, 3 answers"
    assert said[1].startswith(f"  {store / 'key.json'} is damaged (")
    assert len(said) == 2
    precompute.main(["--prune", store.name, "--yes"])
    assert not store.exists()


def test_precompute_refuses(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--store-limit GB allows more"):
        precompute.main([*flags, "--store-limit", "0"])
    with pytest.raises(UserError, match="unknown argument --verfy; near it: --verify"):
        precompute.main([*flags, "--verfy", "3"])


@pytest.mark.slow
def test_sweep(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--arch", "airbench94", "--epochs", "1", "--batch-size", "8", "--T-list", "1,4", "--w-list", "0.5"]
    sweep.main([*flags, *more])
    said = capsys.readouterr().out
    assert "40 views computed" in said
    assert "0 views computed" in said
    assert len(re.findall(r"^\| [14] \| 0.5 \| [\d.]+ % \| [\d.]+ % \| \d+ \|$", said, flags=re.MULTILINE)) == 2
    assert "to choose among them, hold out training images" in said
    sweep.main([*flags, *more])
    assert capsys.readouterr().out.count("finished before") == 2
    sweep.main([*flags, *more, "--T-list", "2", "--val-split", "8"])
    said = capsys.readouterr().out
    assert "| T | w | held-out accuracy, best epoch | test accuracy, best epoch |" in said
    assert re.search(r"^\| 2 \| 0.5 \| [\d.]+ % \| [\d.]+ % \| [\d.]+ % \| \d+ \|$", said, flags=re.MULTILINE)
    assert "to choose" not in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--T-list", "1;2"], "--T-list must be numbers with commas"),
        (["--w-list", "0.5,2"], "--w must be a number, at least 0, at most 1"),
        (["--output", "x"], "--output names one run"),
    ],
)
def test_sweep_refuses(wrong: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(wrong)


@pytest.mark.slow
def test_benchmark(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    small = ("--arch", "airbench94", "--teacher-arch", "airbench94", "--batch-size", 4, "--device", "cpu")
    found = command("scripts/benchmark.py", *small, "--rounds", 1, "--seconds", 0, "--json", file)
    assert found.returncode == 0, found.stderr
    figures = json.loads(file.read_text())
    assert list(figures) == ["original", "original_eval", "usual", "ce", "empty_store", "full_store"]
    for row in figures.values():
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["peak_memory"] > 1e8
    assert figures["original"]["to_original"] == figures["ce"]["to_ce"] == 1
    assert found.stdout.count("\n| ") == 7


def test_figures_of_the_benchmark() -> None:
    seconds = {"original": [8.0, 10.0, 12.0], "ce": [1.0, 1.0, 2.0]}
    found = benchmark.summarise(seconds, {"original": 1.0, "ce": 2.0}, 100)
    assert found["original"]["images_per_second"] == 10
    assert found["ce"]["to_original"] == 8
    assert found["ce"]["to_original_range"] == [6, 10]
    assert found["original"]["to_ce"] == 1 / 8


def test_the_fastest_peer_in_the_figures_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"original": [8.0, 8.0], "ce": [1.0, 1.0], "torchdistill": [6.0, 6.0], "timm": [4.0, 5.0]}
    found = benchmark.summarise(seconds, dict.fromkeys(seconds, 1.0), 100)
    assert found["timm"]["to_fastest_peer"] == 1
    assert found["ce"]["to_fastest_peer"] == 4.5
    assert found["ce"]["to_fastest_peer_range"] == [4, 5]
    benchmark.show(found)
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "times the fastest peer (timm)" in title
    assert "| 4.50 (4.00 to 5.00) |" in rows[1]


def test_some_rows_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.chosen(benchmark.Benchmark(only="sp,full_store")) == ("ce", "full_store", "sp")
    with pytest.raises(UserError, match=r"--only must be of original, .*, got 'sq'"):
        benchmark.chosen(benchmark.Benchmark(only="sp,sq"))
    found = benchmark.summarise({"ce": [1.0], "sp": [2.0]}, {"ce": 1.0, "sp": 1.0}, 100)
    assert (found["sp"]["to_ce"], "to_original" in found["sp"]) == (0.5, False)
    benchmark.show(found)
    assert "original" not in capsys.readouterr().out


def network_of_a_test() -> nn.Module:
    convolution = nn.Conv2d(3, 4, 3, 2, bias=False)  # BatchNorm takes a bias away again: it would not learn
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize("row", ["torchdistill", "timm"])
def test_a_step_of_a_library_is_ours(row: str) -> None:
    """From the same weights, on 8 equal images so that their order plays no part, the same student comes out."""
    pytest.importorskip(benchmark.PEERS[row])
    from scripts import benchmark_peers

    torch.manual_seed(0)
    student, teacher, image = network_of_a_test(), network_of_a_test().eval(), torch.randn(3, 32, 32)
    images = [(image, 3)] * 8
    learned = []
    for name in ("original_eval", row):
        own = copy.deepcopy(student)
        steps = benchmark_peers.LOOPS[name](own, copy.deepcopy(teacher), images, 8, torch.device("cpu"))
        next(steps)
        learned.append(torch.cat([parameter.detach().flatten() for parameter in own.parameters()]))
    assert not torch.equal(learned[0], torch.cat([parameter.flatten() for parameter in student.parameters()]))
    assert (learned[0] - learned[1]).abs().max() < 1e-5


@pytest.mark.parametrize("row", ["original", "original_eval", "usual", *benchmark.PEERS])
def test_a_step_of_other_programs(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student learns; of the teacher only BatchNorm's statistics may move, and only in the original."""
    pytest.importorskip(benchmark.PEERS.get(row, "torch"))
    from scripts import benchmark_peers

    monkeypatch.setattr(benchmark_peers, "LOADER", {"num_workers": 0, "drop_last": True})
    torch.manual_seed(0)
    student, teacher = network_of_a_test(), network_of_a_test()
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in (student, teacher)]
    step = benchmark_peers.LOOPS[row](student, teacher, benchmark_peers.Images(), 8, torch.device("cpu"))
    next(step)
    learned, changed = (
        {name for name, value in net.state_dict().items() if not torch.equal(value, old[name])}
        for net, old in zip((student, teacher), before, strict=True)
    )
    assert learned == set(student.state_dict())
    assert changed == ({name for name, _ in teacher.named_buffers()} if row == "original" else set())


def test_benchmark_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in benchmark.PEERS:
        monkeypatch.setitem(benchmark.PEERS, row, "peer_that_is_absent")
    for wrong, message in (
        (["--arch", "vgg"], "unknown architecture"),
        (["--json", "/nowhere/x"], "no such directory"),
        (["--peers"], "the rows of peers need peer_that_is_absent: pip install peer_that_is_absent"),
        (["--json", "x" * 300], "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark.main([*wrong, "--device", "cpu"])


# ------------------------------------------------------------------------------------------------- the results' tables
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
    runs = {"teacher-resnet18-seed0": 95.0, "student-seed0": 90.0, "student-seed1": 91.0}
    runs |= {f"student-kd-resnet18-seed{k}": 92 + 0.5 * k for k in range(3)}
    runs |= {"student-finetuned-seed0": 91.5}
    rows = tables.rows("short")
    for name, accuracy in runs.items():
        recipe = replace(rows[name[:-6]], seed=int(name[-1]), precision="float32")
        assert results.record("short", [finished_run(tmp_path / name, recipe, accuracy, tables.CIFAR10)])
    kept = (records / "short" / "student-kd-resnet18-seed0.json").read_text()
    assert (json.loads(kept)["teacher_digest"], json.loads(kept)["last_epoch"]) == ("abc", {"epoch": 2})
    assert "secret" not in kept
    lines = tables.accuracies("short")
    assert lines[2] == "| none: CE | | 90.50 +- 0.71 (90.67) |  |  | 91.50, n = 1 | 20 | 12 | 2 |"
    taught = "| resnet18 | 95.00 | 92.50 +- 0.50 | +2.00 | +2.50 | - | 12, 20 | 12, 12 | 3 |"
    assert lines[3:5] == ["| airbench94 | - | - | - | - | - | 30, 20 | -, - | - |", taught]
    assert lines[-1] == "Measured on: cpu, 2 threads; commits 0123456-dirty."
    assert tables.accuracies("full")[3] == "| resnet152 | - (92.41) | - (92.12) | - | - | - | 60, 300 | -, - | - |"
    begin, end = results.MARKERS
    (tmp_path / "checkpoints").mkdir()
    told = "| `efficientnet_b0-ce.pt` | CE | cifar10 | 93.00 % | 300 |\n"  # of another budget
    told += "| `efficientnet_b0-kd.pt` | KD from resnet18 | cifar10 | 92.50 % | 20 |\n"
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
    assert "| CE | 90.50 +- 0.71 |  |  | 2 | 20 | 0.0 |  |" in front
    assert (
        "| +2.00 | 95.00 | 3 | 20 | 0.0 | [efficientnet_b0-kd.pt](checkpoints/published/efficientnet_b0-kd.pt) |"
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
    (records / "short" / "student-seed7.json").write_text("{}")
    with pytest.raises(UserError, match=r"student-seed7.json is no record of a run"):
        tables.accuracies("short")


@pytest.mark.usefixtures("records")
def test_a_student_that_trains_longer(tmp_path: Path) -> None:
    """Its rows are compared with each other, below those of the others, and it needs the same teacher."""
    rows = tables.rows("cpu")
    names = ["student", "student-kd-airbench94", "student-150", "student-150-kd-airbench94"]
    assert [rows[name].epochs for name in names] == [60, 60, 150, 150]
    assert replace(rows["student-150-kd-airbench94"], epochs=60) == rows["student-kd-airbench94"]
    for name, accuracy in zip(names, (90.0, 92.0, 91.0, 94.0), strict=True):
        assert results.record("cpu", [finished_run(tmp_path / f"{name}-seed0", rows[name], accuracy, tables.CIFAR10)])
    lines = tables.accuracies("cpu")
    assert lines[3] == "| airbench94 | - | 92.00 | +2.00 | - | - | 30, 60 | -, 12 | 1 |"
    assert lines[-4:-2] == [
        "| none: CE | | 91.00 |  |  | - | 150 | 12 | 1 |",
        "| airbench94 | - | 94.00 | +3.00 | - | - | 30, 150 | -, 12 | 1 |",
    ]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "README.md").write_text("no weights")
    assert [line.split(" | ")[1] for line in tables.results("cpu")[2:]] == ["90.00", "92.00", "91.00", "94.00"]
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
    with pytest.raises(UserError, match="no student of the table short has been taught"):
        results.main(["--figure", str(tmp_path / "figure.svg")])


def test_what_is_not_recorded(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tables.rows("short")["student"]
    make = partial(finished_run, accuracy=90.0, content=tables.CIFAR10)
    for name, run in (
        (
            "is not finished",
            make(tmp_path / "a" / "student-seed0", student, epochs=40),
        ),
        ("ce-seed0 is no row of the table short", make(tmp_path / "ce-seed0", student)),
        ("student-seed0 has --seed 1", make(tmp_path / "b" / "student-seed0", replace(student, seed=1))),
        (
            "--epochs of student-seed0 is 1, the table's 20",
            make(tmp_path / "c" / "student-seed0", replace(student, epochs=1)),
        ),
        ("other data", finished_run(tmp_path / "d" / "student-seed0", student, 90.0, tables.SUBSET)),
        ("weights that were given", make(tmp_path / "e" / "student-seed0", student, init_digest="def")),
        ("batches in 4 parts", make(tmp_path / "f" / "student-seed0", student, world_size=4)),
    ):
        assert not results.record("short", [run])
        assert name in capsys.readouterr().out
    assert not records.exists()
    taught = tables.rows("short")["student-kd-resnet18"]
    assert results.record("short", [make(tmp_path / "student-kd-resnet18-seed0", taught)])
    assert not results.record(
        "short", [make(tmp_path / "student-kd-resnet18-seed1", replace(taught, seed=1), teacher_digest="other")]
    )
    assert "student-kd-resnet18-seed1 was taught by another resnet18 than the runs in" in capsys.readouterr().out
    cut = make(tmp_path / "g" / "student-seed0", student)
    (cut / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="is not what a run leaves"):
        results.record("short", [cut])
    for wrong, message in (
        ("huge", "--record must be one of full, cpu, short, methods, tuning"),
        ("short", "is no directory of a run"),
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
    assert tables.methods()[2:4] == [
        f"| `nkd` | NKD from densenet40 | {used} | 53.50 +- 0.71 | +3.50 | 80.12 | 2 |",
        "| `ce` | CE |  | 50.00 |  |  | 1 |",
    ]


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
        (("cifar10", "--budget=huge"), "--budget must be one of full, cpu, short, got 'huge'"),
        (("cifar10", "--seeds", "0"), "--seeds must be an integer, at least 1, got 0"),
        (("cifar10", "--only", "teacher-vgg"), "--only must be of teacher-resnet152, teacher-densenet40"),
        (("methods", "--only", ""), "--only must be text, got ''"),
        (("methods", "--only", "kd,,ce"), "--only must be of ce, kd, kd-T1"),
        (("methods", "--seed=3"), "--seed is for one run: --seeds N"),
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


@pytest.mark.slow
def test_reproduce_trains_what_a_row_needs(small_npz: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["cifar10", "--budget", "short", "--only", "student-kd-resnet18-finetuned", "--data", str(small_npz)]
    flags += ["--batch-size=20", "--epochs", "1", "--precision", "float32"]
    reproduce.main(flags)
    shown = capsys.readouterr()
    said = shown.out
    names = ["teacher-resnet18-seed0", "student-seed0", "student-kd-resnet18-finetuned-seed0"]
    assert [line.removeprefix("== ") for line in said.splitlines() if line.startswith("==")] == names
    assert shown.err.count("note: --epochs of teacher-resnet18-seed0 is 1, the table's 12") == 1
    assert said.count("not recorded: ") == 3
    assert said.count(": epochs left 1, about ") == 3
    assert said.count("together about ") == 1
    assert sorted(path.name for path in (home / "cifar10-short").iterdir()) == sorted(names)
    configs = [json.loads((home / "cifar10-short" / name / "config.json").read_text()) for name in names]
    assert [(c["recipe"]["arch"], c["recipe"]["lr"]) for c in configs] == [
        ("resnet18", 0.1),
        ("efficientnet_b0", 0.1),
        ("efficientnet_b0", 0.02),
    ]
    reproduce.main(flags)
    said = capsys.readouterr().out
    assert (said.count("finished before"), said.count("epochs left")) == (3, 0)
    reproduce.main([*flags, "--show-recipe"])
    assert [run["run"] for run in json.loads(capsys.readouterr().out)] == names
    flags[flags.index("student-kd-resnet18-finetuned")] = "student-kd-densenet40"
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


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand for a network of one convolution, BatchNorm and linear layer; the table of two."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = Classifier(nn.Sequential(*layers, nn.Linear(4, 10)), CIFAR_INPUT).eval()
    parameters, activations, macs = model_size.count(network)
    assert parameters == 3 * 4 * 9 + 2 * 4 + 4 * 10 + 10
    assert activations == 2 * 4 * 32 * 32
    assert macs == 32 * 32 * 4 * 3 * 9 + 4 * 10
    file = tmp_path / "sizes.json"
    model_size.main(
        ["--arch", "densenet40", "--vs", "resnet18", "--rounds", "1", "--batch-size", "2", "--json", str(file)]
    )
    found = json.loads(file.read_text())
    assert [size["parameters"] for size in found] == [1059298, 11173962]
    assert all(1.8 < size["bytes_float32"] / size["bytes_float16"] < 2 for size in found)
    assert "| share | 1054.85 % |" in capsys.readouterr().out
    layer = nn.TransformerEncoderLayer(1024, 2, dim_feedforward=16, batch_first=True)
    network = Classifier(nn.Sequential(nn.Flatten(2), layer), CIFAR_INPUT).eval()
    assert model_size.count(network)[2] == 3 * 1024 * (4 * 1024 + 2 * 16) + 2 * 3 * 3 * 1024
    with pytest.raises(UserError, match="unknown architecture 'resnet1'"):
        model_size.main(["--arch", "resnet1"])


@pytest.mark.slow
def test_what_is_published() -> None:
    """Each file is the one that checkpoints/README.md tells of, and knows what its network should."""
    told = dict(re.findall(r"^\| `(\S+)` .* ([0-9a-f]{64}) \|$", publish.README.read_text(), re.MULTILINE))
    files = {path.name: path for path in task.PUBLISHED.glob("*.pt")}
    assert "densenet40-ce.pt" in files
    assert told == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    small = task.SmallImages(Recipe(), Options(data="sample", device="cpu"))
    for path in files.values():
        assert path.stat().st_size < 8e6
        assert publish.measure(path, small) > 85


@pytest.mark.slow
def test_published_weights(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """float16, measured from the file, a line for each file, found by its architecture."""
    monkeypatch.setattr(task, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(publish, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("Text.\n")
    data = ["--data", str(small_npz)]
    flags = [*data, "--arch", "densenet_cifar", "--epochs", "1", "--batch-size", "8", "--ema", "0.9"]
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is none of densenet_cifar, but of nothing"):
        train_kd.main([*flags, "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", "published"])
    train_ce.main([*flags, "--output", str(run)])
    with pytest.raises(UserError, match="was trained on small, with other images than those of --data"):
        publish.main([str(run), "--data", "sample"])
    with pytest.raises(UserError, match="was trained on small: name that by --data"):
        publish.main([str(run)])
    assert not (tmp_path / "published").exists()
    publish.main([str(run), *data])
    with (tmp_path / "README.md").open("a") as readme:
        readme.write("\nAnd more.\n")
    publish.main([str(run), *data])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Text.\n\n| file | trained by |")
    assert text.endswith(" |\n\nAnd more.\n")
    assert text.count("| `densenet_cifar-ce.pt` | CE | small |") == 1
    file = tmp_path / "published" / "densenet_cifar-ce.pt"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    saved = torch.load(file, weights_only=True)
    average = torch.load(run / "last.pt", weights_only=True)["average"]
    assert all(torch.equal(saved["student"][key], average[key].half()) for key in average if "num" not in key)
    capsys.readouterr()
    train_kd.main([*flags, "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", "published"])
    said = capsys.readouterr().out
    accuracy = re.search(r"\| small \| ([\d.]+) % \|", text)
    assert accuracy
    assert f"teacher: densenet_cifar from {file}, test accuracy {accuracy[1]} %" in said
    train_ce.main([*flags, "--init", str(file), "--output", str(tmp_path / "more")])
    publish.main([str(tmp_path / "more"), *data])
    assert (tmp_path / "README.md").read_text().count("| `densenet_cifar-ce.pt` | CE, finetuned | small |") == 1
    assert [path.name for path in (tmp_path / "published").iterdir()] == [file.name]
    with pytest.raises(UserError, match="is no directory of a run"):
        publish.main([str(tmp_path), *data])
