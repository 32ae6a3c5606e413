"""An ONNX file in int8, by onnxruntime's post-training static quantisation: per channel, as QDQ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from distill.data.datasets import TestData, spread
from distill.models.classifier import Classifier

CALIBRATION_IMAGES = 512


def quantise(float32: Path, path: Path, batches: Iterator[NDArray[np.float32]]) -> None:
    """Writes the network in the file `float32` in int8 to `path`, with the ranges of activations that `batches` show.

    batches: images float32 (B, 3, S, S) in [0, 1].
    """
    quant_pre_process(str(float32), str(path), skip_symbolic_shape=True)  # its folding of constants is what is wanted
    quantize_static(
        str(path),
        str(path),
        Batches(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    told = [operators for operators in model.opset_import if operators.domain in used]
    del model.opset_import[:]  # onnxruntime names those of all its own operators, which older ones refuse
    model.opset_import.extend(told)
    onnx.save(model, path)


def calibration_images(classifier: Classifier, data: TestData) -> Iterator[NDArray[np.float32]]:
    """Yields CALIBRATION_IMAGES of the training images, in places that are spread evenly, as the network wants them."""
    for _, images, _ in spread(data, CALIBRATION_IMAGES):
        yield (classifier.resize(images) / 255).contiguous().numpy()


class Batches(CalibrationDataReader):
    """Batches as onnxruntime asks for them."""

    def __init__(self, batches: Iterator[NDArray[np.float32]]) -> None:
        self._batches = batches

    def get_next(self) -> Any:
        """Returns the next batch by the name of the input, None after the last."""
        images = next(self._batches, None)
        return None if images is None else {"image": images}
