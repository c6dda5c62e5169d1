"""Apply a plan again: to a Program, or to the nn.Module that it was made from."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import fx, nn

from kfe_fx.errors import PlanError, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program, named_tensors, put_tensor, tied_names
from kfe_fx.shapes import propagate
from kfe_fx.structure import template_of

aten = torch.ops.aten

Target = TypeVar("Target", Program, nn.Module)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def apply(plan: Plan, target: Target, example_inputs: Any = None) -> Target:
    """Return a smaller copy of ``target``: a Program, or the original nn.Module (with ``example_inputs``).

    Of a module the tensors are cut by name and the widths that torch's layers write down (``out_channels``,
    ``normalized_shape``, ...) follow; then it must give the outputs of the shrunk Program.

    Raises:
        PlanError: the plan does not fit, or the module's own code holds a width; its Program has none.
        UsageError: a module without example inputs.
    """
    if isinstance(target, Program):
        return Shrink(plan).run(target).program
    if not isinstance(target, nn.Module):
        raise UsageError(f"a plan applies to a Program or an nn.Module, got {type(target).__name__}")
    if example_inputs is None:
        raise UsageError("example_inputs are needed to apply a plan to a module: apply(plan, module, example_inputs)")
    if plan.decomposed:
        raise PlanError(
            f"the plan decomposes layers ({next(iter(plan.decomposed))}, ...), which a module's code knows nothing of; "
            "use the Program of the result, result.program"
        )
    if plan.dropped:
        raise PlanError(
            f"the plan drops whole branches ({plan.dropped[0]}, ...), which a module's code would still run; "
            "use result.module()"
        )
    small = Shrink(plan).run(capture(target, example_inputs)).program
    twin = copy.deepcopy(target)
    _cut(twin, small)
    _follow(twin, small)
    _compare(twin, small)
    return twin


def _cut(module: nn.Module, small: Program) -> None:
    cut = named_tensors(small.module())
    lasting = module.state_dict().keys()
    for names in set(tied_names(module).values()):
        old, new = named_tensors(module)[names[0]], cut[names[0]]
        if old.shape == new.shape:
            continue
        value = new.detach().clone()
        value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for name in names:
            put_tensor(module, name, value, persistent=name in lasting)


def _follow(module: nn.Module, small: Program) -> None:
    written = _written(small)
    for path, layer in module.named_modules():
        for name, value in written.get(path, {}).items():
            if hasattr(layer, name):
                setattr(layer, name, value)
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            _follow_recurrent(path, layer)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        elif isinstance(layer, nn.modules.conv._ConvNd):
            wide, narrow = weight.shape[0], weight.shape[1] * layer.groups
            layer.in_channels, layer.out_channels = (wide, narrow) if layer.transposed else (narrow, wide)
        elif isinstance(layer, nn.Embedding):
            layer.num_embeddings, layer.embedding_dim = weight.shape


def _follow_recurrent(path: str, layer: Any) -> None:
    single = isinstance(layer, nn.RNNCellBase)
    names = ["weight_hh"] if single else [names[1] for names in layer._all_weights]
    gates = 4 if isinstance(layer, nn.LSTM | nn.LSTMCell) else 3 if isinstance(layer, nn.GRU | nn.GRUCell) else 1
    shapes = {tuple(getattr(layer, name).shape) for name in names}
    if len(shapes) > 1:
        raise PlanError(f"{path}: its layers and directions now have widths of their own; use result.module()")
    rows, columns = next(iter(shapes))
    layer.hidden_size = rows // gates
    layer.input_size = getattr(layer, "weight_ih" if single else "weight_ih_l0").shape[1]
    if not single:
        layer.proj_size = columns if layer.proj_size else 0
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def _written(small: Program) -> dict[str, dict[str, Any]]:
    """Collect by module path what convolutions and norms write down beside their weights: read from the graph."""
    fakes = propagate(small, sizes=dict.fromkeys(small.batch_axes(), 2))
    found: dict[str, dict[str, Any]] = {}
    for node in small.graphs["eval"].nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if "conv" in str(node.target) and "groups" in names:
            values = {"groups": given.get("groups", 1)}
        elif node.target in (aten.layer_norm.default, aten.rms_norm.default):
            values = {"normalized_shape": tuple(given["normalized_shape"])}
        elif node.target is aten.group_norm.default:
            values = {"num_groups": given["num_groups"], "num_channels": fakes[given["input"]].shape[1]}
        elif node.target in (aten.batch_norm.default, aten.instance_norm.default):
            values = {"num_features": fakes[given["input"]].shape[1]}
        else:
            continue
        weight = given.get("weight")
        paths = [str(node.meta.get("module", ""))]  # a norm without a weight is known by the module that ran it
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            paths = [name.rpartition(".")[0] for name in small.names_of(str(weight.target))]
        for path in paths:
            found[path] = values
    return found


def _compare(module: nn.Module, small: Program) -> None:
    args, kwargs = small.example_inputs
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        first = str(error).strip().splitlines()[0]
        raise PlanError(
            f"the module's own code holds a width ({first}); use result.module(), which holds none"
        ) from None
    finally:
        module.train(was)
    _, found = template_of(outputs, lambda item: isinstance(item, torch.Tensor))
    with torch.no_grad():
        expected = [v for v in small.module().run_flat(small.flat_examples()) if isinstance(v, torch.Tensor)]
    for ours, theirs in zip(found, expected, strict=True):
        allowed = _TOLERANCE.get(theirs.dtype, 1e-2) * max(1.0, float(theirs.abs().max()))
        if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= allowed:
            raise PlanError("the module's own code holds a width and gives other outputs; use result.module()")
