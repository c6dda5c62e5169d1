"""What the parts of a program file are called, and which version this is."""

from __future__ import annotations

FORMAT = "kfe-fx program"
VERSION = 1
# Features without which a file cannot be understood. A file that requires one that is not here is refused by name;
# leaf modules and sub-graphs will be such features.
GATES = "hard-concrete-gates"  # parameters of gates that are on: without them it is another network
FEATURES: frozenset[str] = frozenset({GATES})

GRAPH = "kfe/graph.json"  # beside torch's own data.pkl and data/N
EXTRA = "kfe/data/"  # tensors that are not in the state dict
LARGEST_GRAPH = 2**26  # bytes of JSON; the largest networks need a quarter of it

FIELDS = (
    *("format", "version", "requires", "written_by", "byteorder", "graphs", "signature", "modules", "tensors"),
    *("examples", "axes", "axis_bounds", "calibration", "lineage", "notes", "leaves", "subgraphs", "sections"),
)
