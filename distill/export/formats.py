"""The files that a network is written to, and how each is loaded back."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distill.errors import UserError
from distill.export.check import ExportError, Run
from distill.export.portable import Description, Portable
from distill.files import checkpoint
from distill.models import weights
from distill.models.classifier import Classifier

DESCRIPTION = "description.json"  # inside a .pt2


@dataclass(frozen=True)
class Source:
    """What is written: a classifier on the CPU, what is said of it, and what makes its network anew."""

    classifier: Classifier
    description: Description
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Format:
    """write(source, path); load(path, source) -> the file at work; packages: that it needs."""

    write: Callable[[Source, Path], None]
    load: Callable[[Path, Source], Run]
    packages: tuple[str, ...] = ()


def find_format(path: Path) -> Format:
    """Returns the format that the ending of `path` stands for. Raises UserError, also for packages that are missing."""
    found = FORMATS.get(path.suffix)
    if found is None:
        raise UserError(f"--to must end with {', '.join(FORMATS)}, got {path.name!r}")
    missing = [name for name in found.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to {path.name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return found


# ----------------------------------------------------------------------------------------------------------- as program
def trace(source: Source) -> ExportedProgram:
    """Returns the network as torch.export sees it, for any number of images. Raises ExportError with its reason."""
    portable, size = Portable(source.classifier), source.classifier.spec.size
    batch = {"image": {0: Dim("batch")}}
    try:
        program = torch.export.export(portable, (torch.rand(2, 3, size, size),), dynamic_shapes=batch)
    except Exception as error:  # torch raises nearly anything
        raise not_exported(source, error) from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the directories of this machine
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' warnings about their own code to themselves: what they write is checked afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def not_exported(source: Source, error: Exception) -> ExportError:
    """Returns the error that says in one line why a network cannot be exported."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ExportError(f"{source.description.arch} cannot be exported: {lines[0][:200]}")


def write_pt2(source: Source, path: Path) -> None:
    """Writes torch.export's program; the description is a file in it."""
    description = {DESCRIPTION: source.description.json()}
    with _quiet():
        torch.export.save(trace(source), path, extra_files=description)


def load_pt2(path: Path, _: Source) -> Run:
    """Returns a program of torch.export at work."""
    program = torch.export.load(path).module()
    return lambda images: program(images)[0]


# ----------------------------------------------------------------------------------------------------------- as weights
def write_pt(source: Source, path: Path) -> None:
    """Writes a plain state_dict."""
    torch.save(_state(source), path)


def write_safetensors(source: Source, path: Path) -> None:
    """Writes the weights alone; what is said of them belongs into a .json beside them."""
    from safetensors.torch import save

    path.write_bytes(save(_state(source), metadata={"format": "pt"}))  # its own writer hides the file from others


def _state(source: Source) -> dict[str, Tensor]:
    """Returns the weights one after another in memory: safetensors knows no strides, and no tensors that share."""
    state = source.classifier.network.state_dict()
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def load_weights(path: Path, source: Source) -> Run:
    """Returns a new network of the same kind with the weights of a file."""
    network = source.build()
    checkpoint.apply_weights(network, weights.load(path).state, str(path))
    portable = Portable(Classifier(network, source.classifier.spec))
    return lambda images: portable(images)[0]


# -------------------------------------------------------------------------------------------------------------- as ONNX
def write_onnx(source: Source, path: Path) -> None:
    """Writes one file with weights and description."""
    from distill.export import onnx_file

    with _quiet():
        program = trace(source)
        try:
            onnx_file.write(program, path)
        except OSError:  # of the file, not of the network
            raise
        except Exception as error:
            raise not_exported(source, error) from None
    onnx_file.describe(path, source.description)


def load_onnx(path: Path, _: Source) -> Run:
    """Returns an ONNX file at work in onnxruntime."""
    from distill.export import onnx_file

    return onnx_file.load(path)


FORMATS = {
    ".onnx": Format(write_onnx, load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    ".pt2": Format(write_pt2, load_pt2),
    ".safetensors": Format(write_safetensors, load_weights, ("safetensors",)),
    ".pt": Format(write_pt, load_weights),
}
