"""Dense truth: one network per kind of layer, its gradients by a loop over examples, its rows by autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import Block, Blocks, Store, find_blocks, fit
from kfe_fx.program import Program

CLASSES = 3
EXAMPLES = 5
TIGHT = {"rtol": 1e-9, "atol": 1e-13}
Rows = dict[str, Tensor]


class Around(nn.Module):
    """One layer between a fixed nonlinearity and a head; ``time_major`` turns [N, T, D] over for the layer alone."""

    def __init__(self, layer: nn.Module, width: int, *, time_major: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.time_major = time_major
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = x if isinstance(self.layer, nn.Embedding) else torch.sin(x)
        y = self.layer(y.transpose(0, 1)).transpose(0, 1) if self.time_major else self.layer(y)
        return self.head(torch.tanh(y).flatten(1))


@dataclass(frozen=True)
class Family:
    """A kind of layer: how to make it, how wide what it makes is, and the shape of one example."""

    layer: Callable[[], nn.Module]
    width: int
    shape: tuple[int, ...]
    time_major: bool = False
    vocabulary: int = 0


FAMILIES: dict[str, Family] = {
    "linear": Family(lambda: nn.Linear(4, 3), 3, (4,)),
    "linear 3-D": Family(lambda: nn.Linear(4, 3), 9, (3, 4)),
    "linear 4-D": Family(lambda: nn.Linear(3, 2), 12, (2, 3, 3)),
    "linear time-major": Family(lambda: nn.Linear(4, 3), 9, (3, 4), time_major=True),
    "linear without bias": Family(lambda: nn.Linear(4, 3, bias=False), 9, (3, 4)),
    "conv1d": Family(lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), 9, (2, 5)),
    "conv2d": Family(lambda: nn.Conv2d(2, 3, (3, 2), padding=1, stride=(2, 1), dilation=(1, 2)), 18, (2, 4, 3)),
    "conv3d": Family(lambda: nn.Conv3d(2, 2, 2), 8, (2, 2, 3, 3)),
    "conv2d without bias": Family(lambda: nn.Conv2d(2, 3, 2, bias=False), 12, (2, 3, 3)),
    "conv2d grouped": Family(lambda: nn.Conv2d(4, 6, 2, groups=2), 24, (4, 3, 3)),
    "conv2d depthwise": Family(lambda: nn.Conv2d(3, 3, 2, padding=1, groups=3), 27, (3, 2, 2)),
    "conv1d transposed": Family(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), 15, (2, 2)),
    "conv2d transposed": Family(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), 27, (2, 2, 2)),
    "conv2d transposed grouped": Family(lambda: nn.ConvTranspose2d(4, 4, 2, groups=2), 36, (4, 2, 2)),
    "embedding": Family(lambda: nn.Embedding(6, 2), 8, (4,), vocabulary=6),
    "embedding padded": Family(lambda: nn.Embedding(6, 2, padding_idx=1), 8, (4,), vocabulary=6),
}


@dataclass(frozen=True)
class Case:
    """A network with data: the module as it was written, the Program, its blocks."""

    module: Around
    program: Program
    inputs: Tensor
    targets: Tensor
    blocks: Blocks

    @property
    def block(self) -> Block:
        """The block of the layer's weight."""
        return next(block for block in self.blocks.blocks if block.weight == "layer.weight")

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        return self.inputs, self.targets


@lru_cache
def case(name: str) -> Case:
    """Make the network and the data of a family."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        module = Around(family.layer(), family.width, time_major=family.time_major).double()
        shape = (EXAMPLES, *family.shape)
        inputs = torch.randint(0, family.vocabulary, shape) if family.vocabulary else torch.randn(shape).double()
        targets = torch.randint(0, CLASSES, (EXAMPLES,))
    program = kfe_fx.capture(module, (inputs,))
    return Case(module, program, inputs, targets, find_blocks(program))


@lru_cache
def store(name: str, source: str = "exact", sharing: str = "expand") -> Store:
    """Fit everything on the data of a family."""
    made = case(name)
    statistics = ("diagonal", "ekfac")
    return fit(
        made.program, made.data, "cross-entropy", statistics=statistics, source=source, sharing=sharing, batch_size=2
    )


def flat_rows(module: nn.Module, values: Callable[[int], list[Tensor]], count: int) -> Rows:
    """Return the gradients of scalars ``values(n)`` of each example n, one after the other: [M, *shape] by name."""
    parameters = dict(module.named_parameters())
    rows = [
        torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
        for n in range(count)
        for value in values(n)
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(parameters)}


def gradients(module: nn.Module, inputs: Tensor, targets: Tensor) -> Rows:
    """Return the gradient of each example's cross-entropy, an example at a time."""
    return flat_rows(module, lambda n: [F.cross_entropy(module(inputs[n : n + 1]), targets[n : n + 1])], len(inputs))


def columns(module: nn.Module, inputs: Tensor) -> Rows:
    """Return ``sqrt(p_c) grad log p_c`` for every example and class: their squares sum to the exact Fisher."""

    def values(n: int) -> list[Tensor]:
        logs = F.log_softmax(module(inputs[n : n + 1]), 1)[0]
        return [log * log.detach().exp().sqrt() for log in logs]

    return flat_rows(module, values, len(inputs))


def stacked(block: Block, rows: Rows) -> Tensor:
    """Gather rows as the block's matrix, [M, K, o, i]."""
    return torch.stack(
        [block.matrix({name: rows[name][m] for name in block.parameters}) for m in range(len(rows[block.weight]))]
    )


def fisher(block: Block, rows: Rows, count: int) -> Tensor:
    """Return E_n[vec(dW_n) vec(dW_n)^T] of a block, [P, P]."""
    made = stacked(block, rows).flatten(1)
    return made.T @ made / count


def basis(held: Any, shape: tuple[int, int, int]) -> Tensor:
    """Return Q = U_G (x) U_A of a block as one matrix [P, P], block diagonal over groups."""
    groups, high, wide = shape
    made = []
    for group in range(groups):
        left = held.basis["U_G"][group] if "U_G" in held.basis else torch.eye(high, dtype=torch.float64)
        right = held.basis["U_A"][group] if "U_A" in held.basis else torch.eye(wide, dtype=torch.float64)
        made.append(torch.kron(left, right))
    return torch.block_diag(*made)


def kron(G: Tensor, A: Tensor) -> Tensor:
    """Return G (x) A of [K, o, o] (or a diagonal [K, o]) and [K, i, i], block diagonal over groups."""
    high, wide = (torch.diag_embed(factor) if factor.dim() == 2 else factor for factor in (G, A))
    return torch.block_diag(*(torch.kron(one, other) for one, other in zip(high, wide, strict=True)))


@dataclass(frozen=True)
class Sides:
    """Rows of one backward pass of one example: ``left`` [K, R, o], ``right`` [K, R, i], and which is what went in."""

    left: Tensor
    right: Tensor
    given: str


def sides(made: Case, n: int, drawn: int) -> Sides:
    """Take the rows of sqrt(p_c) log p_c for example ``n`` and class ``drawn`` out of the module as it was written.

    Patches are derivatives of the layer's output by its weight: nothing of the library is asked.
    """
    layer, seen = made.module.layer, {}

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["in"], seen["out"] = args[0].detach(), output

    handle = layer.register_forward_hook(hook)
    logs = F.log_softmax(made.module(made.inputs[n : n + 1]), 1)[0]
    handle.remove()
    value = logs[drawn] * logs[drawn].detach().exp().sqrt()
    (grad,) = torch.autograd.grad(value, seen["out"])
    return _SIDES[type(layer)](layer, seen["in"], grad)


def _linear(layer: nn.Linear, data: Tensor, grad: Tensor) -> Sides:
    right = data.reshape(1, -1, layer.in_features)
    return Sides(grad.reshape(1, -1, layer.out_features), _ones(right) if layer.bias is not None else right, "right")


def _embedding(layer: nn.Embedding, data: Tensor, grad: Tensor) -> Sides:
    index = data.reshape(-1)
    left = F.one_hot(index, layer.num_embeddings).to(grad.dtype)
    right = grad.reshape(-1, layer.embedding_dim)
    valid = index != layer.padding_idx if layer.padding_idx is not None else torch.ones_like(index, dtype=torch.bool)
    return Sides(left[valid].unsqueeze(0), right[valid].unsqueeze(0), "left")


def _convolution(layer: Any, data: Tensor, grad: Tensor) -> Sides:
    each = layer.out_channels // layer.groups
    output = layer(data).flatten(2)[0]  # [O, R]
    rights = []
    for group in range(layer.groups):
        first = group * each
        rows = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0][first] for value in output[first]]
        rights.append(torch.stack(rows).flatten(1))
    right = torch.stack(rights)
    left = grad.reshape(layer.groups, each, -1).transpose(1, 2)
    return Sides(left, _ones(right) if layer.bias is not None else right, "right")


def _transposed(layer: Any, data: Tensor, grad: Tensor) -> Sides:
    each = layer.in_channels // layer.groups
    flat = data.reshape(layer.in_channels, -1)
    rights = []
    for group in range(layer.groups):
        first, rows = group * each, []
        for position in range(flat.shape[1]):
            probe = torch.zeros_like(flat)
            probe[first, position] = 1.0
            product = (layer(probe.view_as(data)) * grad).sum()
            rows.append(torch.autograd.grad(product, layer.weight)[0][first].flatten())
        rights.append(torch.stack(rows))
    return Sides(flat.view(layer.groups, each, -1).transpose(1, 2), torch.stack(rights), "left")


_SIDES: dict[type, Callable[[Any, Tensor, Tensor], Sides]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
}


def _ones(right: Tensor) -> Tensor:
    return torch.cat([right, right.new_ones(*right.shape[:-1], 1)], -1)


def factors(made: Case, sharing: str) -> tuple[Tensor, Tensor]:
    """Return A and G from the rows of every example and class, as the papers define them.

    expand: A = sum a a^T / (N R), G = sum g g^T / N; reduce: of the mean over positions of a, of the sum of g, over N.
    The side that gradients are on is summed over the classes drawn; what went in counts once.
    """
    A, G, rows = torch.zeros(()), torch.zeros(()), 0
    for n in range(EXAMPLES):
        for drawn in range(CLASSES):
            found = sides(made, n, drawn)
            left, right = found.left, found.right
            if sharing == "reduce":
                left, right = left.sum(1, keepdim=True), right.mean(1, keepdim=True)
            rows += right.shape[1] if drawn == 0 else 0
            if drawn == 0 or found.given == "left":
                A = A + right.transpose(1, 2) @ right
            if drawn == 0 or found.given == "right":
                G = G + left.transpose(1, 2) @ left
    return A / rows, G / EXAMPLES
