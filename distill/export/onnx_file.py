"""ONNX files: written by torch, made small and neutral, run by onnxruntime. Needs onnx, onnxscript, onnxruntime."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.export import ExportedProgram

from distill.config.environment import cores
from distill.export.check import Run
from distill.export.portable import Description

OPSET = 18
"""What torch's exporter writes without converting. onnxruntime reads it since 1.14 (2023), on phones too."""
IR_VERSION = 8
"""The file format of that opset: onnxruntime before 1.18 refuses the newer one that torch writes."""
LIMIT = 2**31  # bytes of a file: protobuf's


def write(program: ExportedProgram, path: Path) -> None:
    """Writes a program whose input is `image` and whose outputs are `logits` and `probabilities`, weights inside."""
    names = {"input_names": ["image"], "output_names": ["logits", "probabilities"]}
    weights = sum(value.nbytes for value in program.state_dict.values())
    if weights >= LIMIT:
        raise ValueError(f"its weights take {weights / 1e9:.1f} GB, and one ONNX file holds 2 GB")
    exported = torch.onnx.export(program, **names, opset_version=OPSET, dynamo=True, verbose=False)  # type: ignore[arg-type]
    assert exported
    exported.save(path, external_data=False)
    model = onnx.load(path)
    model.ir_version = IR_VERSION
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        del part.metadata_props[:]  # the exporter's notes, with directories of this machine
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def describe(path: Path, description: Description) -> None:
    """Puts `description` into the metadata of the file."""
    model = onnx.load(path)
    onnx.helper.set_model_props(model, description.texts())
    onnx.save(model, path)


def load(path: Path, threads: int | None = None) -> Run:
    """Returns the file at work on the CPU, by `threads`, or all."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or cores()
    settings.log_severity_level = 3  # errors alone
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # takes the cores of what runs beside it
    session: Any = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": images.contiguous().numpy()})[0])

    return run
