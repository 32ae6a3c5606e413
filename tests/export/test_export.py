"""A network as a file for others: what is in it, what it computes, and what is refused."""

import importlib.util
import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from cifar10 import train_ce
from cifar10.models import CIFAR_INPUT, MODELS
from distill.data.datasets import TensorTestData
from distill.errors import UserError
from distill.export import check, formats, onnx_file
from distill.export.check import ExportError
from distill.files import checkpoint
from distill.models.classifier import Classifier, InputSpec
from distill.training.stop import Stopped
from scripts import export
from tests.runs import small_network


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_npz: Path) -> Iterator[Path]:
    """A run of a network of a few layers that is not finished, with averaged weights."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS._builders, "tiny", lambda classes: small_network(classes, seed=5).network)
        flags = ["--data", str(small_npz), "--arch", "tiny", "--ema", "0.5", "--batch-size", "8", "--epochs", "4"]
        with pytest.raises(Stopped):
            train_ce.main([*flags, "--lr", "0.05", "--steps", "10", "--output", str(path)])
        yield path


def average(run: Path) -> dict[str, Tensor]:
    return checkpoint.load(run / "last.pt")["average"]


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its ONNX file, and what was printed when that was written."""
    file, said = tmp_path_factory.mktemp("onnx") / "student.onnx", io.StringIO()
    with redirect_stdout(said):
        export.main([str(run), "--to", str(file)])
    return file, said.getvalue()


@pytest.mark.slow
def test_onnx_holds_the_average_and_says_what_it_is(run: Path, written: tuple[Path, str]) -> None:
    file, said = written
    assert "is not finished: 2 of 4 epochs" in said
    assert re.search(
        r"on 20 test images the largest difference of a logit is \d\.\de-0[5-9] .* agree on 100.00 %", said
    )
    assert re.search(r"one image: torch [\d.]+ ms on 1 thread", said)
    assert [found.name for found in file.parent.iterdir()] == ["student.onnx"]
    model = onnx.load(file)
    assert [(value.name, len(value.type.tensor_type.shape.dim)) for value in model.graph.output] == [
        ("logits", 2),
        ("probabilities", 2),
    ]
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["classes"]) == ["airplane", "automobile", "bird", "cat"]
    assert (told["arch"], told["size"], told["resized"]) == ("tiny", "32", "32")
    assert (told["interpolation"], told.get("first_resized")) == ("bicubic", None)
    assert json.loads(told["mean"]) == list(CIFAR_INPUT.mean)
    assert f"accuracy {float(told['accuracy']):.2f}" in said
    assert told["accuracy_images"] == "20"
    assert str(Path(export.__file__).parent.parent).encode() not in file.read_bytes()  # no path of this machine
    expected = Classifier(MODELS.build("tiny", 4), CIFAR_INPUT)
    expected.network.load_state_dict(average(run))
    images = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    answered = onnx_file.load(file)(images.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(answered, expected.eval()(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pt2", ".safetensors", ".pt"])
def test_files_for_torch(run: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"student{ending}"
    export.main([str(run), "--to", str(file)])
    if ending == ".pt2":
        logits, probabilities = torch.export.load(file).module()(torch.rand(5, 3, 32, 32))
        torch.testing.assert_close(logits.softmax(1), probabilities)
        return
    state = formats.weights.load(file).state
    assert checkpoint.digest(dict(state)) == checkpoint.digest({key: average(run)[key] for key in state})
    if ending == ".safetensors":
        description = json.loads((tmp_path / "student.json").read_text())
        assert description["classes"][2] == "bird"
        assert "less mean, divided by std" in description["input"]
        (tmp_path / "other.json").write_text('{"mine": 1}')
        with pytest.raises(UserError, match=r"other\.json is not the description of such a file"):
            export.main([str(run), "--to", str(tmp_path / "other.safetensors")])
        assert (tmp_path / "other.json").read_text() == '{"mine": 1}'


@pytest.mark.slow
def test_a_wrong_file_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "student.pt"
    file.write_bytes(b"of before")

    def damaged(source: formats.Source, to: Path) -> None:
        state = source.classifier.network.state_dict()
        torch.save({key: value * 1.01 if value.dim() == 4 else value for key, value in state.items()}, to)

    monkeypatch.setitem(formats.FORMATS, ".pt", formats.Format(damaged, formats.load_weights))
    with pytest.raises(ExportError, match="does not compute what the network does, and is not kept: on 20 test images"):
        export.main([str(run), "--to", str(file)])
    assert file.read_bytes() == b"of before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("wrong", [float("nan"), 0.002])
def test_limits_of_the_comparison(wrong: float) -> None:
    """Of a difference of more than a thousandth of the largest logit, and of what is no number."""
    classifier = small_network()
    images = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8)
    data = TensorTestData(images, torch.zeros(6, dtype=torch.int64))
    answers = check.predict(classifier, data)
    largest = answers.logits.abs().max()
    assert check.compare(lambda _: answers.logits + 0.0005 * largest, classifier, data, answers).agreement == 100
    with pytest.raises(ExportError):
        check.compare(lambda _: answers.logits + wrong * largest, classifier, data, answers)


def test_many_images_are_taken_from_everywhere() -> None:
    labels = torch.arange(20_000)
    data = TensorTestData(torch.zeros(20_000, 1, 1, 3, dtype=torch.uint8), labels)
    taken = torch.cat([part for _, part in check.test_images(data)])
    assert len(taken) == len(taken.unique()) == check.SOME
    assert torch.bincount(taken // 2000).tolist() == pytest.approx([100] * 10, abs=8)


@pytest.mark.slow
def test_int8_is_calibrated_on_training_images_and_refused_for_its_accuracy(
    run: Path,
    written: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    float32 = written[0].read_bytes()
    as_before = replace(formats.FORMATS[".onnx"], write=lambda _, to: to.write_bytes(float32))
    monkeypatch.setitem(formats.FORMATS, ".onnx", as_before)
    file, splits = tmp_path / "student.onnx", list[str]()
    from cifar10.task import SmallImages

    given = SmallImages.test_data

    def noted(self: SmallImages, spec: InputSpec, split: str = "test", batch_size: int | None = None) -> Any:
        splits.append(split)
        return given(self, spec, split, batch_size)

    monkeypatch.setattr(SmallImages, "test_data", noted)
    words = [str(run), "--to", str(file), "--int8"]
    export.main([*words, "--max-drop", "100"])
    assert splits.count("train") == 1
    said = capsys.readouterr().out
    found = re.search(r"accuracy: ([\d.]+) % in float32, ([\d.]+) % in int8 on all 20 test images", said)
    assert found
    model = onnx.load(file)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert f"{float(told['accuracy_int8']):.2f}" == found[2]
    assert "QuantizeLinear" in {node.op_type for node in model.graph.node}
    assert [(operators.domain, operators.version) for operators in model.opset_import] == [("", onnx_file.OPSET)]
    assert model.ir_version == onnx_file.IR_VERSION
    file.unlink()
    monkeypatch.setattr(check, "accuracy", lambda *_: next(accuracies))
    accuracies = iter((91.25, 90.0))
    with pytest.raises(ExportError, match=r"costs 1.25 points of accuracy \(91.25 % in float32, 90.00 % in int8"):
        export.main(words)
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_enlarged_takes_images_of_its_size() -> None:
    """Resizing stays outside: what goes in has the network's size already."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = Classifier(network, InputSpec(48, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 54, "bicubic")).eval()
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    pixels = classifier.resize(images) / 255
    assert pixels.shape == (2, 3, 48, 48)
    torch.testing.assert_close(formats.Portable(classifier)(pixels)[0], classifier(images))


def test_what_cannot_be_exported_says_why_in_one_line(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] if x.sum().item() > 0 else x.flatten(1)[:, 4:8]

    source = formats.Source(Classifier(Odd(), CIFAR_INPUT), description(), Odd)
    with pytest.raises(ExportError, match=r"^odd cannot be exported: [^\n]{10,200}$"):
        formats.write_pt2(source, tmp_path / "odd.pt2")


def description() -> formats.Description:
    return formats.Description("odd", ("a", "b", "c", "d"), 32, 32, "bilinear", (0, 0, 0), (1, 1, 1), 25, 20, "d", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN"], "RUN --to FILE is needed"),
        (["RUN", "--to", "/nowhere/a.onnx"], "--to /nowhere/a.onnx: there is no such directory"),
        (["RUN", "--to", "a.tflite"], r"--to must end with .onnx, .pt2, .safetensors, .pt, got 'a.tflite'"),
        (["RUN", "--to", "a.pt2", "--int8"], "--int8 is for .onnx files, got --to a.pt2"),
        (["nowhere", "--to", "a.onnx"], "nowhere does not exist"),
        (["tests", "--to", "a.onnx"], "tests is no run"),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(UserError, match=message):
        export.main(words)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(UserError, match=r"--to a.onnx needs .*: pip install onnx onnxscript onnxruntime"):
        export.main(["RUN", "--to", "a.onnx"])
