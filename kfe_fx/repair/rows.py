"""What a layer with weights reads and gives, as rows of numbers at sampled positions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kfe_fx.curvature.pairings import Convolution, Linear, Steps
from kfe_fx.curvature.rules import convolution, linear
from kfe_fx.program import Program
from kfe_fx.taps import users_of

aten = torch.ops.aten

_RULES: dict[Any, Any] = {
    aten.linear.default: linear,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), convolution),
}


@dataclass(frozen=True)
class Reader:
    """A linear layer or convolution whose weight is a parameter that nothing else uses.

    ``bias`` is its own, or None; ``mean`` the running mean of the batch norm that alone follows it, where it has no
    bias: a constant in front of that norm can go there.
    """

    node: fx.Node
    source: fx.Node
    pairing: Linear | Convolution
    weight: str
    bias: str | None
    mean: str | None

    @property
    def groups(self) -> int:
        """Groups K of the weight, which reads as [K, o, i]."""
        return self.pairing.groups

    @property
    def has_constant(self) -> bool:
        """Whether a constant per output has a place."""
        return self.bias is not None or self.mean is not None

    def own(self, rank: int) -> int:
        """Return the dim of an output of that rank which the weight makes."""
        return rank - 1 - (0 if isinstance(self.pairing, Linear) else len(self.pairing.stride))

    def fits(self, data: Tensor, output: Tensor, outputs: int) -> bool:
        """Tell whether an output has so many features, and a row for each one that is read of ``data``."""
        rule = self.pairing
        own, shape = self.own(data.dim()), list(data.shape)
        shape[own] = outputs
        if not isinstance(rule, Linear):
            sides = zip(data.shape[own + 1 :], rule.padding, rule.dilation, rule.kernel, rule.stride, strict=True)
            shape[own + 1 :] = [
                (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
                for size, padding, dilation, kernel, stride in sides
            ]
        return shape == list(output.shape)

    def rows(self, data: Tensor, output: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Gather what is read and what is given at positions drawn at random.

        Args:
            data: what went in, a batch.
            output: what came out, or what should have, [.., outputs, ..] of the same batch.
            count: how many rows, about.
            generator: of the positions.

        Returns:
            [K, rows, i] and [K, rows, o], float64 or the type of the data.
        """
        if isinstance(self.pairing, Linear):
            read, given = data.reshape(-1, data.shape[-1]), output.reshape(-1, output.shape[-1])
            if len(read) > count:
                chosen = torch.randperm(len(read), generator=generator)[:count]
                read, given = read[chosen], given[chosen]
            return read.unsqueeze(0), given.unsqueeze(0)
        return self._patches(self.pairing, data, output, count, generator)

    def _patches(
        self, rule: Convolution, data: Tensor, output: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        rank = len(rule.stride)
        data, output = (value.reshape(-1, *value.shape[-rank - 1 :]) for value in (data, output))
        if any(before or after for before, after in rule.padding):
            data = F.pad(data, [amount for pair in reversed(rule.padding) for amount in pair])
        data = data.contiguous()
        out = output.shape[2:]
        total = out.numel()
        places = torch.arange(total)
        wanted = max(1, -(-count // len(data)))
        if total > wanted:
            places = torch.randperm(total, generator=generator)[:wanted]
        index = torch.unravel_index(places, tuple(out))
        steps, inner = data.stride(), data.shape[1] // rule.groups
        view = data.as_strided(
            (len(data), rule.groups, inner, *rule.kernel, *out),
            (
                steps[0],
                steps[1] * inner,
                steps[1],
                *(step * by for step, by in zip(steps[2:], rule.dilation, strict=True)),
                *(step * by for step, by in zip(steps[2:], rule.stride, strict=True)),
            ),
        )
        read = view[(..., *index)]  # [M, K, inner, *kernel, P]
        read = read.flatten(2, -2).permute(1, 0, 3, 2).flatten(1, 2)  # [K, M P, i]
        given = output[(..., *index)].unflatten(1, (rule.groups, -1))  # [M, K, o, P]
        return read, given.permute(1, 0, 3, 2).flatten(1, 2)


class _Shapes:
    """What the rules of the pairings may ask, of tensors whose examples come first."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def fixed(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.op == "get_attr"

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        if node.op == "get_attr":
            return tuple(self._program.tensor(str(node.target)).shape)
        return tuple(node.meta["shape"]) if "shape" in node.meta else ()

    def layout(self, node: fx.Node) -> None:
        return None


def reader_of(node: fx.Node, program: Program, uses: Counter[str]) -> Reader | None:
    """Return how a node reads its input, or None where it is no layer that can be fitted.

    Args:
        node: of the evaluation graph.
        program: whose graph it is.
        uses: how often each tensor is read by the nodes of that graph, tied names together.
    """
    rule = _RULES.get(node.target)
    pairing = None if rule is None else rule(_Shapes(program), node)
    if not isinstance(pairing, Linear | Convolution) or isinstance(pairing, Steps):
        return None
    weight, bias = pairing.weight, pairing.bias
    if (
        pairing.data.op == "get_attr"
        or not _own(weight, program, uses)
        or not (bias is None or _own(bias, program, uses))
    ):
        return None
    mean = None if bias is not None else _mean_behind(node, program, uses)
    return Reader(node, pairing.data, pairing, str(weight.target), None if bias is None else str(bias.target), mean)


def uses_of(program: Program) -> Counter[str]:
    """Count how often the nodes of the evaluation graph read each tensor, under its first name."""
    found: Counter[str] = Counter()
    for node in program.graphs["eval"].nodes:
        if node.op == "get_attr":
            found[program.names_of(str(node.target))[0]] += len(node.users)
    return found


def _own(node: fx.Node, program: Program, uses: Counter[str]) -> bool:
    if node.op != "get_attr" or uses[program.names_of(str(node.target))[0]] != 1:
        return False
    return program.tensor(str(node.target)).is_floating_point()


def _mean_behind(node: fx.Node, program: Program, uses: Counter[str]) -> str | None:
    users = users_of(node)
    if len(users) != 1 or users[0].target is not aten.batch_norm.default:
        return None
    mean: Any = users[0].args[3]
    frozen = not isinstance(mean, fx.Node) or bool(users[0].args[5])
    return None if frozen or not _own(mean, program, uses) else str(mean.target)
