"""Take a trained network away: as a file for onnxruntime, for torch without this repository, or as bare weights.

    python scripts/export.py RUN --to student.onnx
    python scripts/export.py RUN --to student.onnx --int8 --max-drop 0.5

RUN is a run's directory, its last.pt, a published file with --data, or a file of others with --arch and --data. The
ending of --to says what is written:

.onnx         ONNX, opset 18: `image` float32 (B, 3, S, S) in [0, 1], normalised inside -> `logits`, `probabilities`
.pt2          the same by torch.export: torch.export.load(FILE).module()(image)
.safetensors  weights alone, and a .json beside them that says what they are of
.pt           a plain state_dict

Each file is loaded back and compared with the network on real test images (all of up to 10,000, else 1,000); one that
computes something else is not kept. --int8 quantises the ONNX file after training, calibrated on training images, and
measures it on all test images.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.config import cli  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.options import option  # noqa: E402
from scripts.trained import NetworkFlags, Opened, open_network  # noqa: E402

if TYPE_CHECKING:
    from distill.export.formats import Format, Source
    from distill.inference.predictions import Predictions


WEIGHTS_INPUT = (
    "RGB in [0, 1], less mean, divided by std, (N, 3, size, size); the network is built by the code of `commit`: "
    "cifar10/models or imagenet/models.py"
)
"""What the network of bare weights takes."""


@dataclass(frozen=True)
class Export(NetworkFlags):
    """The flags of this script."""

    to: str | None = option(None, "the file to write: .onnx, .pt2, .safetensors or .pt", group="output", flags=("-o",))
    int8: bool = option(False, "quantise an .onnx file to 8 bits", group="output")
    max_drop: float = option(1.0, "points of accuracy that --int8 may cost", group="output", least=0, most=100)
    device: str = option("cpu", "where it is traced and compared", group="how", choices=("cpu",))


def main(argv: Sequence[str]) -> None:
    options, given = cli.parse_words(argv, Export(), prog="export.py", description=__doc__ or "", words="RUN")
    if len(given) != 1 or not options.to:
        raise UserError("RUN --to FILE is needed: one network and the file to write; --help shows an example")
    path = Path(options.to)
    cli.check_file(options.to, "--to")
    if options.int8 and path.suffix != ".onnx":
        raise UserError(f"--int8 is for .onnx files, got --to {path.name}")
    from distill.export.formats import find_format

    form = find_format(path)
    if path.suffix == ".safetensors":
        check_json(path.with_suffix(".json"))
    with open_network(given[0], options, images=True) as opened:
        write(opened, form, path, options)


def check_json(path: Path) -> None:
    """Raises UserError where the .json beside the weights cannot be written, or is a file of something else."""
    cli.check_file(str(path), "--to")
    try:
        known = json.loads(path.read_text()) if path.exists() else {"accuracy_images": 0}
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict) or "accuracy_images" not in known:
        raise UserError(f"{path} is not the description of such a file, and would be overwritten: choose another --to")


def write(opened: Opened, form: "Format", path: Path, options: Export) -> None:
    """Writes the network to `path`, under another name until it is known to be right; prints what was measured."""
    from distill.export import check
    from distill.files.checkpoint import write_atomically

    data = opened.task.test_data(opened.classifier.spec)
    expected = check.predict(opened.classifier, data)
    source = describe(opened, expected)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")  # readers go by the ending
    float32 = partial.with_name(f"float32-{partial.name}")
    try:
        form.write(source, partial)
        found = check.compare(form.load(partial, source), source.classifier, data, expected)
        print(f"{path.name}: {found}, accuracy {expected.accuracy:.2f} %")
        files = {"float32": partial}
        if options.int8:
            os.replace(partial, float32)
            quantise(opened, source, float32, partial, options)
            files = {"float32": float32, "int8": partial}
        measure(source, files)
        if path.suffix == ".safetensors":
            description = replace(source.description, input=WEIGHTS_INPUT)
            write_atomically(path.with_suffix(".json"), (description.json() + "\n").encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        float32.unlink(missing_ok=True)
    print(f"written: {path}")


def describe(opened: Opened, expected: "Predictions") -> "Source":
    """Returns what is written, with all that a file says of it."""
    from distill.export.formats import Source
    from distill.export.portable import Description
    from distill.run.provenance import commit

    trained, classifier, task = opened.trained, opened.classifier, opened.task
    description = Description(
        arch=opened.arch,
        classes=classifier.classes,
        mean=classifier.spec.mean,
        std=classifier.spec.std,
        accuracy=expected.accuracy,
        accuracy_images=len(expected.labels),
        data=task.data.name,
        commit=(trained.summary or trained.last_start).get("commit") or trained.weights.commit or commit(),
        **task.preparation(classifier.spec),
    )
    network = task.find_trained(opened.arch, trained.weights)
    return Source(classifier, description, lambda: network.build(num_classes=len(classifier.classes)))


def quantise(opened: Opened, source: "Source", float32: Path, path: Path, options: Export) -> None:
    """Writes the file `float32` in 8 bits to `path`, and its accuracy into it.

    Raises ExportError where it costs more accuracy than --max-drop.
    """
    from distill.export import check, onnx_file
    from distill.export.quantise import calibration_images, quantise

    classifier, task = source.classifier, opened.task
    quantise(float32, path, calibration_images(classifier, task.test_data(classifier.spec, "train")))
    data = task.test_data(classifier.spec)
    before = check.accuracy(onnx_file.load(float32), classifier, data)
    after = check.accuracy(onnx_file.load(path), classifier, data)
    drop = f"{before:.2f} % in float32, {after:.2f} % in int8 on all {len(data.labels)} test images"
    if before - after > options.max_drop:
        raise check.ExportError(
            f"--int8 costs {before - after:.2f} points of accuracy ({drop}), more than --max-drop "
            f"{options.max_drop:g}: the file is not kept"
        )
    print(f"accuracy: {drop}")
    description = replace(source.description, accuracy=before, accuracy_images=len(data.labels), accuracy_int8=after)
    onnx_file.describe(path, description)


def measure(source: "Source", files: dict[str, Path]) -> None:
    """Prints size, parameters and MACs, and of ONNX files how long one image takes beside torch.

    files: by title, the one that is kept last.
    """
    from scripts.model_size import count

    parameters, _, macs = count(source.classifier)
    sizes = ", ".join(f"{title} {path.stat().st_size / 1e6:.2f} MB" for title, path in files.items())
    print(f"size: {sizes}; {parameters:,} parameters, {macs / 1e6:.1f} M MACs for one image")
    if all(path.suffix == ".onnx" for path in files.values()):
        from distill.export.latency import latencies

        for title, times in latencies(source.classifier, files).items():
            parts = [
                f"{taken.median:.2f} ms on {threads} thread{'s' * (threads > 1)} (fastest {taken.fastest:.2f})"
                for threads, taken in times.items()
            ]
            print(f"one image: {title if title == 'torch' else f'onnxruntime {title}'} {', '.join(parts)}")


if __name__ == "__main__":
    cli.run(main)
