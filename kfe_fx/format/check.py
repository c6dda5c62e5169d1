"""Try a program that was just read: it must run on its examples, shown on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from kfe_fx.format import opset
from kfe_fx.format.fields import Malformed
from kfe_fx.program import Program
from kfe_fx.shapes import propagate, sized_examples

# What fake tensors say of an operation whose result's size depends on values (nonzero, masked_select, item)
_NEEDS_VALUES = ("DynamicOutputShapeException", "DataDependentOutputException")
# Fake tensors take statistics and weights of any shape here, the kernels do not
_CHANNEL_NORMS = ("aten.batch_norm.", "aten.instance_norm.", "aten.native_batch_norm.", "aten._native_batch_norm_legit")


def check_runs(program: Program) -> None:
    """Run each graph on fake tensors of the examples' sizes: nothing is computed, no tensor is changed.

    In training a dynamic batch of one becomes two, since norms refuse one example. Where sizes depend on values a copy
    of the program runs for once on the examples themselves.

    Raises:
        Malformed: an operation does not take its arguments.
    """
    for mode in program.graphs:
        sizes = _without_ones(program) if mode == "train" else {}
        try:
            with _silent():
                values = propagate(program, mode, sizes)
        except Exception as error:  # whatever the kernels of some 600 operations raise: all of it means "cannot run"
            if type(error).__name__ not in _NEEDS_VALUES:
                raise _refusal(mode, error) from error
            _run(program, mode, sizes)
        else:
            _check_norms(mode, values)
            _check_statistics(mode, program)
            _check_windows(mode, values)
            _check_writes(mode, values)


def _without_ones(program: Program) -> dict[str, int]:
    named = zip(program.signature.input_names, program.flat_examples(), strict=True)
    dims = ((axis, value.shape[dim]) for name, value in named for dim, axis in program.axes.get(name, {}).items())
    return {axis: 2 for axis, size in dims if size == 1}


def _run(program: Program, mode: str, sizes: dict[str, int]) -> None:
    twin = program.copy()
    try:
        with torch.no_grad():
            twin.module().run_flat(sized_examples(twin, sizes), mode)
    except Exception as error:  # as above
        raise _refusal(mode, error) from error


def _check_norms(mode: str, values: dict[fx.Node, Any]) -> None:
    for node in values:
        if node.op == "call_function" and str(node.target).startswith(_CHANNEL_NORMS):
            taken = [values[arg] for arg in node.args[:5] if isinstance(arg, fx.Node)]
            if any(tuple(value.shape) != tuple(taken[0].shape[1:2]) for value in taken[1:]):
                raise Malformed(f"graphs.{mode} does not run on its examples: {node.name} does not fit its input")


def _check_statistics(mode: str, program: Program) -> None:
    # the kernels of norms have no gradient of their statistics, and say so only when somebody trains
    graph, trained = program.graphs[mode], {name for name, one in _parameters(program) if one.requires_grad}
    tracked: set[fx.Node] = set()
    for node in graph.nodes:
        inherits = node.op == "call_function" and not tracked.isdisjoint(node.all_input_nodes)
        if inherits or (node.op == "get_attr" and node.target in trained):
            tracked.add(node)
        if str(node.target).startswith(_CHANNEL_NORMS) and any(arg in tracked for arg in node.args[3:5]):
            raise Malformed(f"graphs.{mode} cannot be trained: the statistics of {node.name} ask for a gradient")


def _parameters(program: Program) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return program.module().named_parameters(remove_duplicate=False)


def _check_windows(mode: str, values: dict[fx.Node, Any]) -> None:
    # fake tensors also take strides and dilations below 1
    for node in values:
        if node.op == "call_function" and ("conv" in str(node.target) or "pool" in str(node.target)):
            names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            for name in ("stride", "dilation", "groups", "kernel_size"):
                sizes = given.get(name, 1)
                if any(type(s) is int and s < 1 for s in (sizes if isinstance(sizes, list | tuple) else [sizes])):
                    raise Malformed(f"graphs.{mode} does not run on its examples: {node.name}: {name} below 1")


def _check_writes(mode: str, values: dict[fx.Node, Any]) -> None:
    # fake tensors also take a value that is larger than the buffer it is written into
    for node in values:
        pair = node.args[:2]
        if opset.writes(node.target) and len(pair) == 2 and all(isinstance(arg, fx.Node) for arg in pair):
            into, value = (tuple(values[arg].shape) for arg in pair)  # type: ignore[index]
            if len(value) > len(into) or any(s not in (1, t) for s, t in zip(value[::-1], into[::-1], strict=False)):
                raise Malformed(f"graphs.{mode} does not run on its examples: {node.name}: {value} is not {into}")


def _refusal(mode: str, error: Exception) -> Malformed:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Malformed(f"graphs.{mode} does not run on its examples: {reason}"[:300])


@contextmanager
def _silent() -> Iterator[None]:
    # a failure on fake tensors is logged with its traceback; the one line that is raised says it
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def nothing(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)
