"""Inputs where there is no data: noise that matches what the first normalisation remembers of the real inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kfe_fx.program import Program, ProgramModule, copy_graph
from kfe_fx.training.batches import Batch, pinned_batch

aten = torch.ops.aten

BATCH = 64
_STEPS, _RATE = 80, 0.1
_PROBE_ELEMENTS = 2**18
_SCALES = (2, 4, 8, 16)
_LIKE_INDEX = {  # what an index may pass on its way to a table of embeddings
    aten.view.default, aten.reshape.default, aten.to.dtype, aten._to_copy.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.clone.default, aten.contiguous.default, aten.flatten.using_ints,
    aten.slice.Tensor, aten.select.int,
}  # fmt: skip


def draw(program: Program, count: int, seed: int, facts: dict[str, Any] | None = None) -> list[Batch]:
    """Draw ``count`` examples for scores without data.

    Floating-point inputs are a sum of Gaussian noise, white and (along positions) smooth at scales 2, 4, 8 and 16, plus
    a shift. Amplitudes and shift per channel (dim 1 where there are at least two dims beside the batch, else the last)
    are fitted so that mean and variance before the first batch norm come as near as possible to its running statistics;
    without a batch norm the noise is white and standard normal. Integers are uniform over the rows of the smallest
    embedding they index; other inputs (masks, positions) repeat the example.

    Args:
        program: the network.
        count: number of examples.
        seed: of the draw.
        facts: receives "data_free" and, under "matched", the module of the norm that was matched.

    Returns:
        Batches of inputs without targets.
    """
    generator = torch.Generator().manual_seed(seed)
    pinned = pinned_batch(program)
    batch = pinned or min(BATCH, count)
    batches = [_inputs(program, batch, generator) for _ in range(max(1, round(count / batch)))]
    if not _runs(program, [_white(value) for value in batches[0]]):  # an index is shifted on its way to its table
        batches = [_inputs(program, batch, generator, integers=False) for _ in batches]
    mixture = _match(program, _inputs(program, pinned or _probe_size(program), generator))
    if facts is not None:
        norm = _first_norm(program)
        facts["data_free"] = True
        facts["matched"] = norm.meta.get("module", norm.name) if mixture and norm is not None else None
    mixed = [[mixture[i](value) if i in mixture else _white(value) for i, value in enumerate(flat)] for flat in batches]
    return [Batch(flat, None, batch) for flat in mixed]


@dataclass(frozen=True)
class _Noise:
    """Components of an input: [scales, N, ...], each of variance one, the first one white."""

    components: Tensor


@dataclass(frozen=True)
class _Mixture:
    """How much of each scale per channel (its logarithm), and a shift."""

    logs: Tensor
    shift: Tensor

    def __call__(self, noise: _Noise) -> Tensor:
        """Mix the components to an input [N, ...]."""
        parts = noise.components
        return (parts * self.logs.exp().to(parts.dtype)).sum(0) + self.shift.to(parts.dtype)


def _white(value: Any) -> Any:
    return value.components[0] if isinstance(value, _Noise) else value


def _probe_size(program: Program) -> int:
    """Return how many examples the fit looks at: fewer where each has many positions."""
    sizes = [value[0].numel() for value in program.flat_examples() if isinstance(value, Tensor) and value.dim() > 1]
    return min(BATCH, max(8, _PROBE_ELEMENTS // max(sizes, default=1)))


def _inputs(program: Program, count: int, generator: torch.Generator, *, integers: bool = True) -> list[Any]:
    placeholders = {node.name: node for node in program.graphs["eval"].nodes if node.op == "placeholder"}
    flat: list[Any] = []
    for name, example in zip(program.signature.input_names, program.flat_examples(), strict=True):
        if not isinstance(example, Tensor):
            flat.append(example)
            continue
        dim = program.example_dims().get(name)
        shape = tuple(count if place == dim else size for place, size in enumerate(example.shape))
        indexes = integers and not example.is_floating_point() and example.dtype != torch.bool
        rows = _table_rows(program, placeholders[name]) if indexes else None
        if example.is_floating_point():
            flat.append(_noise(shape, example.dtype, generator))
        elif rows is not None:
            flat.append(torch.randint(0, rows, shape, dtype=example.dtype, generator=generator))
        else:
            flat.append(example if dim is None else _repeated(example, dim, count))
    return flat


def _repeated(example: Tensor, dim: int, count: int) -> Tensor:
    return example.index_select(dim, torch.arange(count) % example.shape[dim])


def _noise(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> _Noise:
    parts = [torch.randn(shape, generator=generator)]
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    for scale in _SCALES if len(shape) in modes else ():
        coarse = [max(1, -(-size // scale)) for size in shape[2:]]
        if max(coarse) < 2:
            break
        part = torch.randn(*shape[:2], *coarse, generator=generator)
        part = F.interpolate(part, size=shape[2:], mode=modes[len(shape)], align_corners=False)
        parts.append(part / part.std().clamp_min(1e-6))
    return _Noise(torch.stack(parts).to(dtype))


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


def _match(program: Program, flat: list[Any]) -> dict[int, _Mixture]:
    """Fit the mixture of each floating-point input; {} where nothing can be matched."""
    norm = _first_norm(program)
    noises = {i: value for i, value in enumerate(flat) if isinstance(value, _Noise)}
    if norm is None or not noises:
        return {}
    run = _up_to(program, norm)
    mean, variance = (program.tensor(str(arg.target)).double() for arg in norm.args[3:5])  # type: ignore[union-attr]
    variance = variance.clamp_min(1e-12)
    mixtures = {i: _start(noise) for i, noise in noises.items()}
    variables = [tensor for mixture in mixtures.values() for tensor in (mixture.logs, mixture.shift)]
    optimizer = torch.optim.Adam(variables, lr=_RATE)
    best, kept = float("inf"), {}
    for _ in range(_STEPS):
        with torch.enable_grad():
            inputs = [mixtures[i](value) if i in mixtures else value for i, value in enumerate(flat)]
            seen = run(inputs).double().transpose(0, 1).flatten(1)  # [C, examples * positions]
            off = ((seen.mean(1) - mean).square() / variance).mean()
            off = off + (seen.var(1) / variance).clamp_min(1e-6).log().square().mean()
        if not off.requires_grad or not bool(torch.isfinite(off)):
            break
        if float(off.detach()) < best:
            best = float(off.detach())
            kept = {i: _Mixture(m.logs.detach().clone(), m.shift.detach().clone()) for i, m in mixtures.items()}
        for variable, gradient in zip(variables, torch.autograd.grad(off, variables, allow_unused=True), strict=True):
            variable.grad = gradient
        optimizer.step()
    return kept


def _start(noise: _Noise) -> _Mixture:
    """Start with unit variance, shared evenly by the scales."""
    scales, *shape = noise.components.shape
    broadcast = [1] * len(shape)
    dim = 1 if len(shape) >= 3 else len(shape) - 1
    if len(shape) > 1:
        broadcast[dim] = shape[dim]
    logs = torch.full((scales, *broadcast), -0.5 * math.log(scales), dtype=torch.float64)
    return _Mixture(logs.requires_grad_(), torch.zeros(broadcast, dtype=torch.float64, requires_grad=True))


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
