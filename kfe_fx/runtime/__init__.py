"""Running a Program elsewhere: ONNX files, ONNX Runtime sessions, latency, and proof of equal outputs.

``bench``, ``measure`` and ``parity`` are modules of this package and hold functions of those names.
"""

from kfe_fx.runtime.block import Block as Block
from kfe_fx.runtime.block import probe_block as probe_block
from kfe_fx.runtime.inputs import feeds as feeds
from kfe_fx.runtime.lower import to_exported_program as to_exported_program
from kfe_fx.runtime.measure import Comparison as Comparison
from kfe_fx.runtime.measure import compare as compare
from kfe_fx.runtime.onnx_file import ExportReport as ExportReport
from kfe_fx.runtime.onnx_file import export as export
from kfe_fx.runtime.onnx_file import onnx_bytes as onnx_bytes
from kfe_fx.runtime.parity import ParityReport as ParityReport
from kfe_fx.runtime.session import make_session as make_session
from kfe_fx.runtime.statistics import Interval as Interval
from kfe_fx.runtime.statistics import Latency as Latency
