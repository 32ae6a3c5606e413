"""The files of weights that people really hand over."""

import argparse
import collections
import datetime
import pickle
import random
import shlex
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifar10.models import MODELS
from distill.errors import CheckpointError
from distill.files import checkpoint
from distill.models.weights import fitted, load


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return MODELS.build("densenet40", 10).state_dict()


def fits(path: Path, which: str | None = None) -> nn.Module:
    network = MODELS.build("densenet40", 10)
    checkpoint.apply_weights(network, fitted(load(path, which).state, network, path.name), str(path))
    return network


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "net", "state_dict", "model", "model_state_dict"])
def test_foreign_formats(tmp_path: Path, weights: dict[str, torch.Tensor], prefix: str, wrapper: str | None) -> None:
    content: dict[str, Any] = {prefix + key: value for key, value in weights.items()}
    if wrapper == "net":
        content["module.dense1.0.select.indexes"] = torch.ones(24)
    if wrapper:
        content = {wrapper: content, "acc": 92.41, "epoch": 199}
    torch.save(content, tmp_path / "ckpt.pth")
    fits(tmp_path / "ckpt.pth")


def test_a_runs_directory_stands_for_its_last_checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save({"net": weights}, tmp_path / "last.pt")
    loaded = load(tmp_path)
    assert loaded.source == str(tmp_path / "last.pt")
    assert loaded.state.keys() == weights.keys()
    with pytest.raises(CheckpointError, match=r"is a directory without last\.pt: name a run"):
        load(tmp_path.parent)


def test_files_of_before_torch_1_6(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    old = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    torch.save({"net": old}, tmp_path / "ckpt.t7", _use_new_zipfile_serialization=False)
    fits(tmp_path / "ckpt.t7")


def test_safetensors(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "model.safetensors")
    fits(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "model.safetensors")


def change(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = dict(weights)
    if name == "missing":
        del changed["bn.weight"]
    elif name == "extra":
        changed["bonus"] = torch.zeros(1)
    elif name == "classes":
        changed["fc.weight"], changed["fc.bias"] = torch.zeros(100, 456), torch.zeros(100)
    else:
        changed["fc.bias"] = torch.full((10,), float("nan"))
    return changed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "lacks bn.weight"),
        ("extra", "has bonus"),
        ("classes", r"number of classes: it has fc.weight \(100, 456\) instead of \(10, 456\)"),
        ("nan", "not finite: in fc.bias"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, weights: dict[str, torch.Tensor], name: str, message: str) -> None:
    torch.save(change(name, weights), tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match=message):
        fits(tmp_path / "ckpt.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1], {"net": {}}, {k: {"b": torch.zeros(1)} for k in "ac"}])
def test_files_without_weights(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path / "ckpt.pth")


# ------------------------------------------------------------------------------------------- of the usual trainers
BESIDE: dict[str, Any] = {  # what stands beside weights, by whose file it is
    "torchvision": {"args": argparse.Namespace(lr=0.1, output=Path("x"), when=datetime.datetime.now()), "epoch": 3},
    "timm": {"arch": "resnet18", "args": argparse.Namespace(lr=0.1), "metric": np.float64(92.1), "version": 2},
    "numbers": {"acc": np.float32(92.1), "best": np.array([1.5, 2.5]), "type": np.float32, "dtype": np.dtype("f4")},
    "generators": {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()},
    "containers": {
        "history": collections.defaultdict(list, {"loss": [1.0]}),
        "last": collections.deque([1, 2]),
        "ordered": collections.OrderedDict(a=1),
        "sets": [{1, 2}, frozenset([3])],
        "names": np.array(["cat", "dog"]),
        "objects": np.array([1, None], dtype=object),
    },
    "others": {
        "version": torch.__version__,
        "config": types.SimpleNamespace(a=1),
        "took": [datetime.timedelta(3), datetime.date.today(), datetime.timezone.utc],
        "bytes": [b"", b"latin1", bytes(range(256))],
    },
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("name", BESIDE)
def test_inert_values_beside_the_weights(tmp_path: Path, weights: dict[str, Any], name: str, old: bool) -> None:
    before = torch.serialization.get_safe_globals()
    torch.save({"model": weights, **BESIDE[name]}, tmp_path / "last.pth.tar", _use_new_zipfile_serialization=not old)
    for key, value in fits(tmp_path / "last.pth.tar").state_dict().items():
        assert torch.equal(value, weights[key])
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize("order", ["C", "F"])
def test_weights_as_numpy_arrays(tmp_path: Path, order: Any) -> None:
    numbers = {
        "w": torch.randn(2, 3, 4),
        "half": torch.randn(3, 2).half(),
        "count": torch.tensor(4),
        "yes": torch.ones(2) > 0,
    }
    arrays = {key: value.numpy().copy(order=order) for key, value in numbers.items()}
    torch.save({"state_dict": arrays}, tmp_path / "x.pth")
    found = load(tmp_path / "x.pth").state
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in numbers.items())
    for bad in (np.array(["a"]), np.array([None]), np.zeros(2, dtype=">f4"), np.zeros(2, dtype="f4,f4")):
        torch.save({"state_dict": {**arrays, "bad": bad}}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="holds an array that is not of numbers, bad"):
            load(tmp_path / "x.pth")


@pytest.mark.parametrize("key", ["ema", "state_dict_ema", "model_ema"])
def test_a_choice_of_weights(tmp_path: Path, weights: dict[str, torch.Tensor], key: str) -> None:
    average = {f"module.{name}": value * 0.5 for name, value in weights.items() if value.is_floating_point()}
    average |= {"n_averaged": torch.tensor(3)} if key == "model_ema" else {}
    torch.save({"state_dict": weights, key: average}, tmp_path / "x.pth")
    usual = load(tmp_path / "x.pth", flag="--teacher-weights")
    assert usual.note.endswith(
        f"holds state_dict and {key}: state_dict is taken, --teacher-weights ema takes the other"
    )
    for which, factor in (("raw", 1.0), ("ema", 0.5), (None, 1.0)):
        torch.testing.assert_close(fits(tmp_path / "x.pth", which).state_dict()["fc.bias"], factor * weights["fc.bias"])
    torch.save({"state_dict": weights}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"--weights ema: .* holds state_dict only"):
        load(tmp_path / "x.pth", "ema")


def test_of_ours_the_average_counts(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"student": weights, "average": {key: value * 2 for key, value in weights.items()}})
    for which, factor in ((None, 2), ("ema", 2), ("raw", 1)):
        assert torch.equal(load(path, which).state["fc.bias"], factor * weights["fc.bias"])
    assert load(path).note == ""


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "encoder.backbone."])
def test_a_prefix_that_nobody_knows(
    tmp_path: Path, weights: dict[str, torch.Tensor], prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {prefix + key: value for key, value in weights.items()}
    torch.save({"state_dict": {**named, f"{prefix}total_ops": torch.zeros(1)}}, tmp_path / "x.pth")
    fits(tmp_path / "x.pth")
    said = capsys.readouterr().out
    assert f"note: x.pth: the prefix {prefix!r} of all names is taken off" in said
    assert "note: x.pth: 1 counters are left out (total_ops)" in said
    torch.save({"state_dict": {**named, f"{prefix}bonus": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        fits(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


def test_a_plain_pickle_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="but a plain pickle, or damaged") as error:
        load(tmp_path / "plain.pkl")
    code = shlex.split(str(error.value)[str(error.value).index("python -c") :])[2]
    exec(code, {})
    assert load(tmp_path / "plain-weights.pt").state["w"].tolist() == [1, 1]


def test_names_of_classes_in_files_of_others(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2)}
    for told, names in (
        ({"classes": ["a", "b"]}, ("a", "b")),
        ({"class_to_idx": {"b": 1, "a": 0}}, ("a", "b")),
        ({"classes": 2}, ()),
        ({"classes": ["a", "a"]}, ()),
        ({"class_to_idx": {"b": 1, "a": "x"}}, ()),
        ({"input": {"size": 32}}, ()),
    ):
        torch.save({"state_dict": state, **told}, tmp_path / "x.pth")
        assert load(tmp_path / "x.pth").classes == names
        assert load(tmp_path / "x.pth").spec is None


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_programs_and_whole_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each that is true, whose command works."""
    monkeypatch.chdir(tmp_path)
    torch.save(MODELS.build("densenet_cifar", 10), tmp_path / "whole.pth")
    torch.save({"model": MODELS.build("densenet_cifar", 10)}, tmp_path / "inside.pth")
    torch.save(MODELS.build("densenet_cifar", 10), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "jit.pt")
    for name, message in (
        ("whole.pth", r"is a whole pickled module \(cifar10\.models\.densenet\.\w+\), not weights alone"),
        ("inside.pth", r"it asks for cifar10\.models\.densenet\.\w+, which is no plain weight"),
        ("old.pth", r"it asks for cifar10\.models\.densenet\.\w+, which is no plain weight"),
        ("jit.pt", "is a TorchScript program, not weights alone"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            load(tmp_path / name)
        python, flag, code = shlex.split(str(error.value)[str(error.value).index("python -c") :])
        assert (python, flag) == ("python", "-c")
        if name != "inside.pth":
            exec(code, {})
            assert load(tmp_path / f"{Path(name).stem}-weights.pt").state
