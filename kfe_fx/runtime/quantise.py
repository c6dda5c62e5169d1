"""Int8 copies of ONNX models, as ONNX Runtime's own tools make them, to measure what a quantised network would take.

Weights are int8 per output channel, activations uint8 (u8s8, QDQ), with ranges from a few calibration inputs. Weights
keep to 7 bits: processors without VNNI add two products of u8s8 in 16 bits, which would saturate. What the copies
compute is not looked at any further: they are for the clock.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kfe_fx.errors import UnsupportedModel
from kfe_fx.runtime.lower import first_line
from kfe_fx.runtime.shared_weights import fold_transposes

PRECISIONS = ("fp32", "int8")


def int8(model: bytes, feeds: Sequence[Mapping[str, Any]]) -> bytes:
    """Return an int8 copy of an ONNX model; ``feeds`` are the inputs whose ranges are taken.

    Raises:
        UnsupportedModel: ONNX Runtime's quantiser does not take the model.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory(prefix="kfe-fx-") as folder, _quiet():
        place = Path(folder) / "int8.onnx"
        try:
            loaded = onnx.load_from_string(model)
            fold_transposes(loaded)
            quantize_static(
                loaded, str(place), Reader(), quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True,
            )  # fmt: skip
        except Exception as error:  # whatever the quantiser raises of a model means the same
            raise UnsupportedModel(f"ONNX Runtime cannot quantise this network: {first_line(error)}") from error
        return place.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    # the quantiser talks to the root logger about every norm
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
