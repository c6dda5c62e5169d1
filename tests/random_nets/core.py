"""What every family of the random-network grammar builds on: shapes, choices, steps and their registry."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Options = dict[str, Any]
StepDescription = tuple[str, Options]

KINDS = ("vec", "seq", "image", "signal", "grid")
CHANNELS_FIRST = ("image", "signal")
CHANNELS_LAST = ("vec", "seq", "grid")
MAX_CHANNELS = 24  # a step whose output is wider is dropped from the description
MAX_ELEMENTS = 1600


class Shape(NamedTuple):
    """Describe an activation without its batch: image [C, H, W], signal [C, L], seq [T, C], grid [H, W, C], vec [C]."""

    kind: str
    dims: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Count the channels."""
        return self.dims[0] if self.kind in CHANNELS_FIRST else self.dims[-1]

    @property
    def axis(self) -> int:
        """Give the channel dim of the batched tensor."""
        return 1 if self.kind in CHANNELS_FIRST else len(self.dims)

    @property
    def positions(self) -> tuple[int, ...]:
        """Give the sizes of the dims that are not channels."""
        return self.dims[1:] if self.kind in CHANNELS_FIRST else self.dims[:-1]

    @property
    def position_axes(self) -> tuple[int, ...]:
        """Give the dims of the batched tensor that are neither batch nor channels."""
        return tuple(axis for axis in range(1, len(self.dims) + 1) if axis != self.axis)

    def with_channels(self, channels: int) -> Shape:
        """Change the number of channels."""
        if self.kind in CHANNELS_FIRST:
            return Shape(self.kind, (channels, *self.dims[1:]))
        return Shape(self.kind, (*self.dims[:-1], channels))

    def broadcast(self, channels: int | None = None) -> tuple[int, ...]:
        """Give the batched shape of one number per channel, e.g. [1, C, 1, 1]."""
        sizes = [1] * (len(self.dims) + 1)
        sizes[self.axis] = self.channels if channels is None else channels
        return tuple(sizes)

    def zeros(self, batch: int = 2) -> Tensor:
        """Make an activation of zeros, [batch, *dims]."""
        return torch.zeros(batch, *self.dims)


Scope = dict[str, Shape]  # the inputs of the network that a step may read: "x", and "context" when there is one
Raw = dict[str, Tensor]


class Chooser(Protocol):
    """Make the choices of the grammar: hypothesis behind one implementation, random.Random behind the other."""

    def integer(self, low: int, high: int) -> int:
        """Choose an integer, both ends included; shrinks to low."""
        ...

    def choice(self, items: Sequence[T]) -> T:
        """Choose an item; shrinks to the first."""
        ...


class RandomChooser:
    """Choose with random.Random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """Choose an integer, both ends included."""
        return self.rng.randint(low, high)

    def choice(self, items: Sequence[T]) -> T:
        """Choose an item."""
        return self.rng.choice(items)


class Drawing:
    """Hold what is known while a description is drawn: the choices, the scope, and what is allowed."""

    def __init__(self, chooser: Chooser, scope: Scope, *, zero: bool, families: frozenset[str] | None) -> None:
        self.chooser = chooser
        self.scope = scope
        self.zero = zero  # only ops with f(0) = 0
        self.families = families
        self.frozen = False  # ops that freeze their channels may be drawn
        self.depth = 0

    def integer(self, low: int, high: int) -> int:
        """Choose an integer, both ends included; shrinks to low."""
        return self.chooser.integer(low, high)

    def choice(self, items: Sequence[T]) -> T:
        """Choose an item; shrinks to the first."""
        return self.chooser.choice(items)

    def flag(self, percent: int = 50) -> bool:
        """Choose True in about that many percent; shrinks to False."""
        return self.chooser.integer(0, 99) >= 100 - percent

    def free(self, percent: int = 50) -> bool:
        """Choose as flag does, but always False where zero must stay zero (biases, shifts, affines)."""
        return not self.zero and self.flag(percent)

    def width(self) -> int:
        """Choose a number of channels; the even ones more often, so that groups, splits and shuffles apply."""
        return self.choice((4, 6, 8, 12, 3, 5, 10))

    def activation(self) -> str:
        """Choose the name of an activation, one with f(0) = 0 where zero must stay zero."""
        return self.choice(ZERO_ACTIVATIONS if self.zero else ZERO_ACTIVATIONS + OTHER_ACTIVATIONS)

    def body(self, s: Shape, count: int | None = None, same: bool = False) -> tuple[list[StepDescription], Shape]:
        """Draw nested steps that start from s; with same, only steps that keep the positions and the kind."""
        self.depth += 1
        steps: list[StepDescription] = []
        for _ in range(self.integer(1, 3) if count is None else count):
            drawn = draw_step(self, s)
            if drawn is None:
                continue
            step, after = drawn
            if same and (after.kind != s.kind or after.positions != s.positions):
                continue
            steps.append(step)
            s = after
        self.depth -= 1
        return steps, s


class Step(nn.Module):
    """Be one op, or one small pattern of ops, of a random network: built from a Shape and the drawn options."""

    family: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    keeps_zero: ClassVar[bool]
    freezes: ClassVar[bool]
    nests: ClassVar[bool]
    frequency: ClassVar[int]

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.kind = s.kind  # the kind of the output; a step that changes it says so
        self.certain: list[tuple[str, int]] = []  # (parameter, dim) that no correct analysis may freeze

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        """Draw the options at this shape, or None where the step does not type-check."""
        return {}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        """Compute the step; raw holds the inputs of the whole network."""
        raise NotImplementedError


STEPS: dict[str, type[Step]] = {}


def family(
    name: str,
    kinds: tuple[str, ...] = KINDS,
    *,
    keeps_zero: bool = True,
    freezes: bool = False,
    nests: bool = False,
    frequency: int = 1,
) -> Callable[[type[Step]], type[Step]]:
    """Register a step under the name of its family.

    keeps_zero: with d.zero its channels map 0 to 0. freezes: its channels cannot be pruned, so few networks have it.
    nests: it holds other steps and its constructor takes the scope. frequency: how often it is drawn.
    """

    def register(cls: type[Step]) -> type[Step]:
        cls.family, cls.kinds = name, kinds
        cls.keeps_zero, cls.freezes, cls.nests, cls.frequency = keeps_zero, freezes, nests, frequency
        STEPS[name] = cls
        return cls

    return register


def build(step: StepDescription, s: Shape, scope: Scope) -> Step:
    """Build the module of one described step."""
    name, options = step
    given = {"scope": scope, **options} if STEPS[name].nests else options
    return STEPS[name](s, **given)


def probe(module: Step, s: Shape, scope: Scope) -> Shape:
    """Find the shape that a step gives by running it on zeros."""
    raw = {name: shape.zeros() for name, shape in scope.items()}
    training = module.training
    with torch.no_grad():
        out = module.eval()(s.zeros(), raw)
    module.train(training)
    return Shape(module.kind, tuple(out.shape[1:]))


def draw_step(d: Drawing, s: Shape) -> tuple[StepDescription, Shape] | None:
    """Draw one step that applies to the shape; None where the drawn one does not fit there."""
    names = [
        name
        for name, cls in STEPS.items()
        for _ in range(cls.frequency)
        if s.kind in cls.kinds
        and (cls.keeps_zero or not d.zero)
        and (d.frozen or not cls.freezes)
        and (d.depth < 3 or not cls.nests)
        and (d.families is None or name in d.families)
    ]
    if not names:
        return None
    for _ in range(4):
        name = d.choice(names)
        options = STEPS[name].draw(d, s)
        if options is None:
            continue
        after = probe(build((name, options), s, d.scope), s, d.scope)
        if 2 <= after.channels <= MAX_CHANNELS and math.prod(after.dims) <= MAX_ELEMENTS:
            return (name, options), after
    return None


class Chain(nn.Module):
    """Run steps one after the other; out is the shape after the last."""

    def __init__(self, steps: Sequence[StepDescription], s: Shape, scope: Scope) -> None:
        super().__init__()
        modules: list[Step] = []
        for step in steps:
            modules.append(build(step, s, scope))
            s = probe(modules[-1], s, scope)
        self.steps = nn.ModuleList(modules)
        self.out = s

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        """Run the steps."""
        for step in self.steps:
            x = step(x, raw)
        return x


ZERO_ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "relu6", "mish", "softsign")
OTHER_ACTIVATIONS = ("sigmoid", "softplus", "hardsigmoid", "logsigmoid", "quick_gelu")


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the named activation."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x) + 0.1  # as CLIP writes it, with a shift
    if name == "tanh" or name == "sigmoid":
        return getattr(torch, name)(x)
    return getattr(nn.functional, name)(x)


def project(s: Shape, out: int, bias: bool = True, kernel: int = 1) -> nn.Module:
    """Make the contraction over channels that fits the kind: Linear, or a convolution that keeps the positions."""
    if s.kind == "image":
        return nn.Conv2d(s.channels, out, kernel, padding=kernel // 2, bias=bias)
    if s.kind == "signal":
        return nn.Conv1d(s.channels, out, kernel, padding=kernel // 2, bias=bias)
    return nn.Linear(s.channels, out, bias=bias)


def divisors(n: int, low: int = 2) -> list[int]:
    """List the divisors of n from low to n."""
    return [k for k in range(low, n + 1) if n % k == 0]
