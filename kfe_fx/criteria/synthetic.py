"""Inputs where there is no data: noise that matches what the first normalisation remembers of the real inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.program import Program, ProgramModule, copy_graph
from kfe_fx.training.batches import Batch, pinned_batch

aten = torch.ops.aten

BATCH = 64
_STEPS, _RATE, _PROBE = 60, 0.1, 32
_LIKE_INDEX = {  # what an index may pass on its way to a table of embeddings
    aten.view.default, aten.reshape.default, aten.to.dtype, aten._to_copy.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.contiguous.default, aten.flatten.using_ints,
    aten.slice.Tensor, aten.select.int,
}  # fmt: skip


def draw(program: Program, count: int, seed: int, facts: dict[str, Any] | None = None) -> list[Batch]:
    """Draw ``count`` examples for scores without data.

    Floating-point inputs are standard normal, then scaled and shifted per channel (dim 1 where there are at least two
    dims beside the batch, else the last) so that mean and variance before the first batch norm come as near as possible
    to its running statistics. Integers are uniform over the rows of the smallest embedding they index; other inputs
    (masks, positions) repeat the example.

    Args:
        program: the network.
        count: number of examples.
        seed: of the draw.
        facts: receives "data_free" and, under "matched", the module of the norm that was matched.

    Returns:
        Batches of inputs without targets.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = pinned_batch(program) or min(BATCH, count)
    found = [_inputs(program, batch, generator) for _ in range(max(1, round(count / batch)))]
    if not _runs(program, found[0]):  # an index that is shifted on its way to its table
        found = [_inputs(program, batch, generator, integers=False) for _ in found]
    affine = _match(program, _inputs(program, _PROBE if pinned_batch(program) is None else batch, generator))
    for flat in found:
        for place, (scale, shift) in affine.items():
            flat[place] = flat[place] * scale + shift
    if facts is not None:
        facts["data_free"] = True
        norm = _first_norm(program)
        facts["matched"] = norm.meta.get("module", norm.name) if affine and norm is not None else None
    return [Batch(flat, None, batch) for flat in found]


def _inputs(program: Program, count: int, generator: torch.Generator, *, integers: bool = True) -> list[Any]:
    placeholders = {node.name: node for node in program.graphs["eval"].nodes if node.op == "placeholder"}
    flat: list[Any] = []
    for name, example in zip(program.signature.input_names, program.flat_examples(), strict=True):
        if not isinstance(example, Tensor):
            flat.append(example)
            continue
        counts = example.dim() > 0 and 0 in program.axes.get(name, {})
        shape = (count, *example.shape[1:]) if counts else tuple(example.shape)
        indexes = integers and not example.is_floating_point() and example.dtype != torch.bool
        rows = _table_rows(program, placeholders[name]) if indexes else None
        if example.is_floating_point():
            flat.append(torch.randn(shape, dtype=example.dtype, generator=generator))
        elif rows is not None:
            flat.append(torch.randint(0, rows, shape, dtype=example.dtype, generator=generator))
        else:
            flat.append(example[torch.arange(count) % len(example)] if counts else example)
    return flat


def _runs(program: Program, flat: list[Any]) -> bool:
    try:
        with torch.no_grad():
            program.module().run_flat(flat, "eval")
    except (IndexError, RuntimeError):
        return False
    return True


def _table_rows(program: Program, node: fx.Node) -> int | None:
    """Return the rows of the smallest embedding that the values of an input index, or None."""
    rows: list[int] = []
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if user.target is aten.embedding.default:
                table = user.args[0]
                if isinstance(table, fx.Node) and table.op == "get_attr":
                    rows.append(len(program.tensor(str(table.target))))
            elif user.target in _LIKE_INDEX:
                frontier.append(user)
    return min(rows, default=None)


def _first_norm(program: Program) -> fx.Node | None:
    for node in program.graphs["eval"].nodes:
        if node.target is aten.batch_norm.default and isinstance(node.args[4], fx.Node) and not node.args[5]:
            return node
    return None


def _match(program: Program, flat: list[Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Fit a scale and a shift per channel of each floating-point input; {} where nothing can be matched."""
    norm = _first_norm(program)
    if norm is None:
        return {}
    run = _up_to(program, norm)
    mean, variance = (program.tensor(str(arg.target)).double() for arg in norm.args[3:5])  # type: ignore[union-attr]
    deviation = variance.clamp_min(1e-12).sqrt()
    free = {
        i: _affine(value) for i, value in enumerate(flat) if isinstance(value, Tensor) and value.is_floating_point()
    }
    variables = [tensor for pair in free.values() for tensor in pair]
    if not variables:
        return {}
    optimizer = torch.optim.Adam(variables, lr=_RATE)

    def scaled() -> dict[int, tuple[Tensor, Tensor]]:
        return {i: (log.exp().to(flat[i].dtype), shift.to(flat[i].dtype)) for i, (log, shift) in free.items()}

    best, kept = float("inf"), {}
    for _ in range(_STEPS):
        pairs = scaled()
        with torch.enable_grad():
            inputs = [v * pairs[i][0] + pairs[i][1] if i in pairs else v for i, v in enumerate(flat)]
            seen = run(inputs).double().transpose(0, 1).flatten(1)  # [C, examples * positions]
            off = ((seen.mean(1) - mean) / deviation).square().mean()
            off = off + (seen.var(1) / deviation.square()).clamp_min(1e-6).log().square().mean()
        if not off.requires_grad or not bool(torch.isfinite(off)):
            break
        if float(off.detach()) < best:
            best, kept = (
                float(off.detach()),
                {i: (a.detach().clone(), b.detach().clone()) for i, (a, b) in pairs.items()},
            )
        for variable, gradient in zip(variables, torch.autograd.grad(off, variables, allow_unused=True), strict=True):
            variable.grad = gradient
        optimizer.step()
    return kept


def _affine(value: Tensor) -> tuple[Tensor, Tensor]:
    shape = [1] * value.dim()
    dim = 1 if value.dim() >= 3 else value.dim() - 1
    if value.dim() > 1:
        shape[dim] = value.shape[dim]
    zeros = torch.zeros(shape, dtype=torch.float64)
    return zeros.clone().requires_grad_(), zeros.clone().requires_grad_()


def _up_to(program: Program, norm: fx.Node) -> Any:
    """Return a function from flat inputs to what goes into ``norm``."""
    source = program.module()
    graph = copy_graph(program.graphs["eval"])
    nodes = {node.name: node for node in graph.nodes}
    end = next(iter(reversed(graph.nodes)))
    end.args = ((nodes[norm.name].args[0],),)
    graph.eliminate_dead_code()
    part = ProgramModule({"eval": graph}, source.signature)
    part._modules, part._parameters, part._buffers = source._modules, source._parameters, source._buffers
    return lambda flat: part.run_flat(flat)[0]
