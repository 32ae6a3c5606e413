"""The scripts beside training: filling and keeping stores, a sweep, sizes of networks, publishing."""

import hashlib
import io
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from cifar10 import task, train_ce, train_kd
from cifar10.models import CIFAR_INPUT
from distill.config.recipe import Options, Recipe
from distill.errors import UserError
from distill.files import checkpoint
from distill.models.classifier import Classifier
from scripts import model_size, precompute, publish, sweep

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.slow
def test_precompute_fills_what_training_reads(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert precompute.main([*flags, "--epochs", "2"]) == 0
    assert "80 views are in" in capsys.readouterr().out
    assert precompute.main([*flags, "--epochs", "1", "--views", "3"]) == 0
    said = capsys.readouterr().out
    assert "view 2 of 3: 0 computed by this call" in said
    assert "120 views are in" in said
    assert "40 of them computed by this call" in said
    train_kd.main([*flags, "--arch", "airbench94", "--epochs", "3", "--batch-size", "8"])
    assert "teacher: 0 views computed, 120 were in the store" in capsys.readouterr().out


@pytest.mark.slow
def test_precompute_ends_where_nothing_can_be_stored(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("distill.teacher.store.checkpoint.write_atomically", Mock(side_effect=OSError(28, "full")))
        with pytest.raises(UserError, match="has what was stored before that"):
            precompute.main([*flags, "--views", "2"])
    assert "warning: [Errno 28] full; the teacher's logits are not stored from here on" in capsys.readouterr().err
    assert precompute.main([*flags, "--views", "2"]) == 0


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
    precompute.main([*flags, "--views", "2", "--sizes", "24:5"])
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

    precompute.main([*flags, "--views", "1"])
    (path,) = (home / "stores").glob("*/0*.pt")
    segment = checkpoint.load(path)
    segment["rows"][3] += 1
    checkpoint.save(path, segment)
    assert precompute.main([*flags, "--verify", "40"]) == 1
    assert "40 answers asked again: 39 the same" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:99])
    for _ in range(2):  # it is named and put aside, and then there is nothing
        with pytest.raises(UserError, match="has nothing of these views"):
            precompute.main([*flags, "--verify", "40"])
    assert f"{path} is damaged" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="airbench94 has no finished run on small: train it, or name its weights"):
        precompute.main(flags[:4])
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
    assert sweep.main([*flags, *more, "--T-list", "1,3", "--lr", "0.01", "--epochs", "2"]) == 1
    said = capsys.readouterr().out
    assert "T1-w0.5-seed0 holds another run: " in said
    assert "| 1 | 0.5 | another run | - | - |" in said
    assert re.search(r"^\| 3 \| 0.5 \| [\d.]+ %", said, flags=re.MULTILINE)
    sweep.main([*flags, *more, "--T-list", "5,6", "--lr", "1e30"])
    assert capsys.readouterr().out.count("| 0.5 | diverged | - | - |") == 2
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
        (["--evaluate"], "--evaluate is for one run"),
        (["--show-features"], "--show-features is for one run"),
    ],
)
def test_sweep_refuses(wrong: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(wrong)


def test_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand for a network of one convolution, BatchNorm and linear layer; the table of two."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = Classifier(nn.Sequential(*layers, nn.Linear(4, 10)), CIFAR_INPUT).eval()
    parameters, activations, macs = model_size.count(network)
    assert parameters == 3 * 4 * 9 + 2 * 4 + 4 * 10 + 10
    network.network[0].requires_grad_(False)  # type: ignore[index]
    assert model_size.count(network)[0] == parameters - 3 * 4 * 9
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
    checkpoint.save(file, {**checkpoint.load(file), "data_content": "of other images"})
    with pytest.raises(UserError, match="was trained on other images; --replace takes this one instead"):
        publish.main([str(run), *data])
    publish.main([str(run), *data, "--replace"])
    average = torch.load(run / "last.pt", weights_only=True)["average"]
    assert all(torch.equal(saved["student"][key], average[key].half()) for key in average if "num" not in key)
    capsys.readouterr()
    train_kd.main([*flags, "--teacher-arch", "densenet_cifar", "--teacher-checkpoint", "published"])
    said = capsys.readouterr().out
    accuracy = re.search(r"\| small \| ([\d.]+) % \|", text)
    assert accuracy
    assert f"teacher: densenet_cifar from {file}, test accuracy {accuracy[1]} %" in said
    train_ce.main([*flags, "--init", str(file), "--output", str(tmp_path / "more")])
    assert f"note: {file} by --init is taken" not in capsys.readouterr().out
    publish.main([str(tmp_path / "more"), *data])
    assert (tmp_path / "README.md").read_text().count("| `densenet_cifar-ce.pt` | CE, finetuned | small |") == 1
    assert [path.name for path in (tmp_path / "published").iterdir()] == [file.name]
    with pytest.raises(UserError, match="is no directory of a run"):
        publish.main([str(tmp_path), *data])
