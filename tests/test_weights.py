"""The files of weights that people really hand over."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10.models import MODELS
from distill import checkpoint
from distill.errors import CheckpointError
from distill.weights import load


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return MODELS.build("densenet40", 10).state_dict()


def fits(path: Path) -> None:
    checkpoint.apply_weights(MODELS.build("densenet40", 10), load(path).state, str(path))


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
