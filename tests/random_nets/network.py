"""The whole random network: its description, the module that interprets it, and the two ways to draw one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import attention, channels, contraction, convolution, norms, pointwise, recurrent, spatial, structure, unknown
from .core import STEPS, Chain, Chooser, Drawing, RandomChooser, Raw, Scope, Shape, Step, StepDescription, T, project
from .fill import fill

__all__ = ["FAMILIES", "Case", "RandomNet", "case_of", "draw_description", "nets", "sample_net"]

MODULES = (convolution, contraction, norms, pointwise, channels, structure, spatial, attention, recurrent, unknown)
FAMILIES: tuple[str, ...] = tuple(STEPS)  # of steps; a case also names "input-tokens", "output-tuple" and the like
Description = dict[str, Any]
VOCABULARY = 11


class Tower(nn.Module):
    """Contract, activate, contract: the pair at the start or the end that is removable in every network."""

    def __init__(self, s: Shape, hidden: int, out: int) -> None:
        super().__init__()
        self.first = project(s, hidden)
        self.second = project(s.with_channels(hidden), out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, ...] to the same positions with another width."""
        return self.second(torch.nn.functional.relu(self.first(x)))


class RandomNet(nn.Module):
    """Interpret a description; the same description gives the same weights, to the bit.

    The weights of a contraction have deviation 1/sqrt(fan-in), everything else is far from 0 and from 1 (so that a
    slice taken from the wrong place shows), and each output is scaled to root mean square 1.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        d = description
        kind, dims = d["input"]
        self.out_style = d["output"]
        scope: Scope = {} if kind == "tokens" else {"x": Shape(kind, tuple(dims))}
        self.input_names = ["x"]
        if d["context"]:
            scope["context"] = Shape("seq", tuple(d["context"]))
            self.input_names.append("context")
        self.scope = scope
        self.tokens = dims[0]  # the length, where the input is tokens
        with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
            if kind == "tokens":
                self.embedding = nn.Embedding(VOCABULARY, d["embedding"])
                s = Shape("seq", (*dims, d["embedding"]))
            else:
                s = scope["x"]
            self.stem = None
            if d["stem"]:
                self.stem = Tower(s, *d["stem"]) if len(d["stem"]) > 1 else project(s, d["stem"][0])
                s = s.with_channels(d["stem"][-1])
            self.blocks = nn.ModuleList()
            for block in d["blocks"]:
                self.blocks.append(chain := Chain(block, s, scope))
                s = chain.out
            self.tower = Tower(s, *d["tower"]) if d["tower"] else None
            s = s.with_channels(d["tower"][-1]) if d["tower"] else s
            self.heads = nn.ModuleList(self.head(style, out, s, d["embedding"]) for style, out in d["heads"])
            self.head_styles = [style for style, _ in d["heads"]]
            self.axes = s.position_axes
            self.shape = s
        self.double()
        self.eval()
        fill(self, d["seed"])
        self.calibrate()

    def head(self, style: str, out: int, s: Shape, embedding: int) -> nn.Module:
        """Make one head: over the pooled vector, the flattened activation, every position, or tied to the embedding."""
        if style == "positions":
            return project(s, out)
        if style == "flatten":
            return nn.Linear(torch.Size(s.dims).numel(), out)
        if style == "tied":
            head = nn.Linear(s.channels, VOCABULARY, bias=False)
            head.weight = self.embedding.weight
            return head
        if style == "features":
            return nn.Identity()
        return nn.Linear(s.channels, out)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        """Compute the outputs: a tensor, a tuple or a dict of tensors."""
        raw: Raw = {"x": x}
        if context is not None:
            raw["context"] = context
        y = self.embedding(x) if hasattr(self, "embedding") else x
        if self.stem is not None:
            y = self.stem(y)
        for block in self.blocks:
            y = block(y, raw)
        if self.tower is not None:
            y = self.tower(y)
        outs = []
        for style, head in zip(self.head_styles, self.heads, strict=True):
            if style == "pooled":
                outs.append(head(y.mean(self.axes) if self.axes else y))
            elif style == "flatten":
                outs.append(head(y.flatten(1)))
            else:
                outs.append(head(y))
        if self.out_style == "tuple":
            return tuple(outs)
        if self.out_style == "dict":
            return {f"out{k}": out for k, out in enumerate(outs)}
        return outs[0]

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Make inputs of that many examples."""
        g = torch.Generator().manual_seed(1000 + seed)
        result: list[Tensor] = []
        if "x" not in self.scope:
            result.append(torch.randint(0, VOCABULARY, (batch, self.tokens), generator=g))
        result += [torch.randn(batch, *s.dims, generator=g, dtype=torch.float64) for s in self.scope.values()]
        return tuple(result)

    def calibrate(self) -> None:
        """Scale the heads so that every output has root mean square 1 on one batch."""
        with torch.no_grad():
            for head, out in zip(self.heads, outputs(self(*self.inputs(4, seed=1))), strict=True):
                rms = out.pow(2).mean().sqrt()
                if isinstance(head, nn.Identity) or not (torch.isfinite(rms) and rms > 1e-6):
                    continue
                if "x" in self.scope or head.weight is not self.embedding.weight:
                    for p in head.parameters():
                        p.div_(rms)

    def healthy(self) -> bool:
        """Say whether the outputs are finite, neither tiny nor huge, and differ between examples."""
        with torch.no_grad():
            for out in outputs(self(*self.inputs(4, seed=1))):
                rms = out.pow(2).mean().sqrt()
                spread = (out - out.mean(0, keepdim=True)).pow(2).mean().sqrt()
                if not (1e-2 <= rms <= 1e2 and spread > 1e-4 * rms and out.abs().max() < 1e3):
                    return False
        return True


def outputs(result: Any) -> list[Tensor]:
    """List the tensors that a network returns."""
    if isinstance(result, Tensor):
        return [result]
    return list(result.values()) if isinstance(result, dict) else list(result)


@dataclass(frozen=True, eq=False)
class Case:
    """Be one random network with inputs at batch 2; its repr is the expression that rebuilds the network."""

    module: RandomNet
    inputs: tuple[Tensor, ...]
    description: Description
    families: frozenset[str]
    zero_preserving: bool  # every op between a producer and its consumers maps a channel of zeros to zeros
    removable: tuple[tuple[str, int], ...]  # (parameter, dim) that no correct analysis may freeze as a whole

    def __repr__(self) -> str:
        return f"RandomNet({self.description!r})"

    def make_inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Make inputs at another batch size."""
        return self.module.inputs(batch, seed)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Give the batch axis of every input, {"x": {0: "batch"}, ...}."""
        return {name: {0: "batch"} for name in self.module.input_names}


def case_of(description: Description) -> Case:
    """Build the case of a description."""
    net = RandomNet(description)
    removable = [(f"{name}.first.weight", 0) for name in ("stem", "tower") if isinstance(getattr(net, name), Tower)]
    for name, module in net.named_modules():
        if isinstance(module, Step):
            removable += [(f"{name}.{parameter}", dim) for parameter, dim in module.certain]
    return Case(net, net.inputs(2), description, families_of(description), description["zero"], tuple(removable))


def families_of(description: Description) -> frozenset[str]:
    """Collect the names of the steps at every depth, and of the kinds of input and output."""
    names = {f"input-{description['input'][0]}", f"output-{description['output']}"}
    names |= {f"head-{style}" for style, _ in description["heads"]}
    names |= {"second-input"} if description["context"] else set()
    names |= set() if description["stem"] else {"no-stem"}

    def walk(node: Any) -> None:
        if isinstance(node, (tuple, list)):
            if len(node) == 2 and isinstance(node[0], str) and node[0] in STEPS:
                names.add(node[0])
            for child in node:
                walk(child)
        elif isinstance(node, dict):
            for child in node.values():
                walk(child)

    walk(description["blocks"])
    return frozenset(names)


def draw_input(chooser: Chooser, families: frozenset[str] | None) -> tuple[str, tuple[int, ...]]:
    """Draw the kind and the sizes of the first input, a kind to which some wanted family applies."""
    kinds = ["vec", "seq", "image", "signal", "tokens", "image", "seq", "image"]
    if families is not None:
        wanted = {kind for name in families for kind in STEPS[name].kinds}
        kinds = [kind for kind in kinds if (kind if kind != "tokens" else "seq") in wanted] or kinds
    kind = chooser.choice(kinds)
    if kind == "vec":
        return kind, (chooser.integer(3, 8),)
    if kind == "seq":
        return kind, (chooser.integer(4, 8), chooser.integer(2, 6))
    if kind == "signal":
        return kind, (chooser.integer(2, 4), chooser.integer(5, 9))
    if kind == "tokens":
        return kind, (chooser.integer(4, 8),)
    return kind, (chooser.integer(1, 4), chooser.integer(4, 9), chooser.integer(4, 9))


def draw_description(
    chooser: Chooser, max_blocks: int = 4, families: frozenset[str] | None = None, zero: bool | None = None
) -> Description:
    """Draw the description of a network: plain data that prints, shrinks and rebuilds."""
    unknown = sorted((families or frozenset()) - set(STEPS))
    if unknown:
        raise ValueError(f"no such families: {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    kind, dims = draw_input(chooser, families)
    scope: Scope = {} if kind == "tokens" else {"x": Shape(kind, dims)}
    d = Drawing(chooser, scope, zero=False, families=families)
    context = (d.integer(2, 5), d.integer(3, 6)) if d.flag(20) else ()
    if context:
        scope["context"] = Shape("seq", context)
    d.zero = d.flag(30) if zero is None else zero
    d.frozen = not d.zero and (families is not None or d.flag(15))
    embedding = d.width() if kind == "tokens" else 0
    s = Shape("seq", (*dims, embedding)) if kind == "tokens" else scope["x"]

    tail = d.flag(60)  # where the pair of contractions stands that can always be cut
    stem = () if tail and d.flag(30) else (d.width(),) if tail else (d.width(), d.width())
    s = s.with_channels(stem[-1]) if stem else s
    blocks: list[list[StepDescription]] = []
    for _ in range(d.integer(1, max_blocks)):
        block, s = d.body(s, count=d.integer(1, 4))
        d.depth = 0
        if block:
            blocks.append(block)
    tower = (d.width(), embedding or d.width()) if tail else ()
    s = s.with_channels(tower[-1]) if tower else s

    styles = ["positions", "pooled", "flatten"] + (["features"] if d.flag(12) else [])
    styles += ["tied", "tied"] if embedding and s.kind in ("vec", "seq") and s.channels == embedding else []
    heads = [(d.choice(styles), d.integer(2, 5)) for _ in range(2 if d.flag(25) else 1)]
    output = d.choice(("tuple", "dict")) if len(heads) > 1 else d.choice(("tensor", "tensor", "tensor", "dict"))
    description: Description = {
        "input": (kind, dims),
        "context": context,
        "embedding": embedding,
        "stem": stem,
        "blocks": blocks,
        "tower": tower,
        "heads": heads,
        "output": output,
        "zero": d.zero,
        "seed": d.integer(0, 999),
    }
    return description


def draw_case(chooser: Chooser, max_blocks: int, families: Iterable[str] | None, zero_preserving: bool | None) -> Case:
    """Draw a description and build it; with other weights where the first give constant, tiny or huge outputs."""
    wanted = None if families is None else frozenset(families)
    description = draw_description(chooser, max_blocks, wanted, zero_preserving)
    case = case_of(description)
    for _ in range(4):
        if case.module.healthy():
            break
        description = description | {"seed": description["seed"] + 1000}
        case = case_of(description)
    return case


class HypothesisChooser:
    """Choose through hypothesis, so that networks shrink."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, low: int, high: int) -> int:
        """Choose an integer, both ends included; shrinks to low."""
        return self.draw(st.integers(low, high))

    def choice(self, items: Sequence[T]) -> T:
        """Choose an item; shrinks to the first."""
        return self.draw(st.sampled_from(list(items)))


@st.composite
def hypothesis_case(draw: st.DrawFn, *arguments: Any) -> Case:
    """Draw a case through hypothesis."""
    return draw_case(HypothesisChooser(draw), *arguments)


def nets(
    max_blocks: int = 4, families: Iterable[str] | None = None, zero_preserving: bool | None = None
) -> st.SearchStrategy[Case]:
    """Make the strategy of random networks.

    max_blocks: at most that many blocks of 1 to 4 steps. families: only steps of these, of FAMILIES. zero_preserving:
    only such networks, or none of them; by default three in ten are.
    """
    return hypothesis_case(max_blocks, families, zero_preserving)


def sample_net(
    seed: int,
    max_blocks: int = 4,
    families: Iterable[str] | None = None,
    zero_preserving: bool | None = None,
) -> Case:
    """Draw the network of a seed without hypothesis, from the same grammar; the options are those of nets."""
    return draw_case(RandomChooser(seed), max_blocks, families, zero_preserving)
