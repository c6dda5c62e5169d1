"""kfe-fx: a compiler for trained networks.

It reads a PyTorch model, makes it physically smaller under a budget of real run time, and writes an ONNX
file that is proved to compute the same thing:

    import kfe_fx

    program = kfe_fx.capture(module, example_inputs)
    result = kfe_fx.prune(program, budget=0.5, data=(inputs, targets))
    kfe_fx.export(result.program, "model.onnx")

Names are loaded when they are first used, so that importing kfe_fx costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kfe_fx.errors import (
    BadData,
    BadFile,
    InfeasibleBudget,
    KfeError,
    MissingDependency,
    PlanError,
    UnsupportedModel,
    UsageError,
    VerificationFailed,
)

if TYPE_CHECKING:
    from kfe_fx import curvature as curvature
    from kfe_fx import optim as optim
    from kfe_fx.format import save as save
    from kfe_fx.frontend.capture import capture as capture
    from kfe_fx.frontend.load import load_program as load
    from kfe_fx.labels.analysis import analyze as analyze
    from kfe_fx.passes.apply import apply as apply
    from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent as BatchnormRecurrent
    from kfe_fx.passes.finalise_recurrent import FinaliseRecurrent as FinaliseRecurrent
    from kfe_fx.passes.fold_recurrent_batchnorm import FoldRecurrentBatchnorm as FoldRecurrentBatchnorm
    from kfe_fx.passes.pareto import pareto as pareto
    from kfe_fx.passes.prune import PruneResult as PruneResult
    from kfe_fx.passes.prune import prune as prune
    from kfe_fx.passes.sparsify import sparsify as sparsify
    from kfe_fx.plan import Plan as Plan
    from kfe_fx.program import Program as Program
    from kfe_fx.runtime.artifacts import verify as verify
    from kfe_fx.runtime.onnx_file import export as export
    from kfe_fx.training.train import train as train

__version__ = "0.1.0"

# public name -> "module:attribute"
_LAZY = {
    "BatchnormRecurrent": "kfe_fx.passes.batchnorm_recurrent:BatchnormRecurrent",
    "FinaliseRecurrent": "kfe_fx.passes.finalise_recurrent:FinaliseRecurrent",
    "FoldRecurrentBatchnorm": "kfe_fx.passes.fold_recurrent_batchnorm:FoldRecurrentBatchnorm",
    "Plan": "kfe_fx.plan:Plan",
    "Program": "kfe_fx.program:Program",
    "PruneResult": "kfe_fx.passes.prune:PruneResult",
    "apply": "kfe_fx.passes.apply:apply",
    "analyze": "kfe_fx.labels.analysis:analyze",
    "capture": "kfe_fx.frontend.capture:capture",
    "export": "kfe_fx.runtime.onnx_file:export",
    "pareto": "kfe_fx.passes.pareto:pareto",
    "load": "kfe_fx.frontend.load:load_program",
    "prune": "kfe_fx.passes.prune:prune",
    "save": "kfe_fx.format:save",
    "sparsify": "kfe_fx.passes.sparsify:sparsify",
    "train": "kfe_fx.training.train:train",
    "verify": "kfe_fx.runtime.artifacts:verify",
}

__all__ = [
    "BadData",
    "BadFile",
    "BatchnormRecurrent",
    "FinaliseRecurrent",
    "FoldRecurrentBatchnorm",
    "InfeasibleBudget",
    "KfeError",
    "MissingDependency",
    "Plan",
    "PlanError",
    "Program",
    "PruneResult",
    "UnsupportedModel",
    "UsageError",
    "VerificationFailed",
    "__version__",
    "analyze",
    "apply",
    "capture",
    "export",
    "load",
    "pareto",
    "prune",
    "save",
    "sparsify",
    "train",
    "verify",
]

# packages that are part of the public face: kfe_fx.curvature.fit, kfe_fx.optim.EKFAC
_PACKAGES = ("curvature", "optim")


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it, once."""
    if name in _PACKAGES:
        return importlib.import_module(f"kfe_fx.{name}")
    try:
        module, attribute = _LAZY[name].split(":")
    except KeyError:
        raise AttributeError(f"module 'kfe_fx' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List what is loaded and what can be."""
    return sorted({*globals(), *_LAZY, *_PACKAGES})
