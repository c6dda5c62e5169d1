"""Hard concrete gates: random multipliers in [0, 1] whose chance to be zero can be trained.

With u uniform on (0, 1), one draw for each unit and mini-batch (Louizos, Welling & Kingma 2018, equations 10 to 13):

    s = sigmoid((log u - log(1 - u) + log alpha) / beta)       z = min(1, max(0, s (zeta - gamma) + gamma))
    P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta))   zhat = min(1, max(0, sigmoid(log alpha)(zeta - gamma)
                                                                                    + gamma)) in evaluation

A gate is zero in evaluation, so that its unit can go, where log alpha <= log(-gamma / zeta) = -2.398; it is one where
log alpha >= 2.398. zhat is not E[z] (log alpha = 2: 0.957 beside 0.857), so that running statistics behind gates are to
be measured again (``finalise-gates`` does, with data).

Gates stand where ``GateSite`` says, after the norm that follows a unit. Of a recurrent layer they multiply what others
read of a unit: the columns of the recurrent weight (or of the projection) and the outputs, which folds into weights for
every cell; a GRU carries its own state on without them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.gates import (
    GATE,
    gate_after,
    gate_arguments,
    group_at,
    has_gates,
    missing_sites,
    set_argument,
    strip,
)
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.registry import rule
from kfe_fx.labels.sites import GateSite
from kfe_fx.labels.tracker import Tracker
from kfe_fx.program import Program, copy_graph, put_tensor
from kfe_fx.recurrent.op import Arguments

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LEAST, MOST = math.log(1e-2), math.log(1e2)  # what log alpha is held between while it is trained
SIGMA = 0.01  # of log alpha at the start
DROP_RATE = 0.1  # 0.5 in the paper, for networks that are not trained yet: it halves every unit at the start
_EDGE = 1e-6  # how near to 0 and 1 u comes

MODULE = "kfe_gates"  # what log alpha lies in: kfe_gates.GROUP.log_alpha
SECTION = "gates"  # of a Program: how the analysis took attention apart, and whether there was a training graph

_LIBRARY = torch.library.Library("kfe_fx", "FRAGMENT")
_LIBRARY.define(
    "hard_concrete(Tensor log_alpha, bool training=False) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


def gate_at_test(log_alpha: Tensor) -> Tensor:
    """Return zhat, what a gate is in evaluation; exactly 0 and 1 from |log alpha| = 2.398 on."""
    return (log_alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def gate_sample(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Return z of draws ``u`` from the uniform distribution, like ``log_alpha``; differentiable by log alpha."""
    u = u.clamp(_EDGE, 1 - _EDGE)
    s = ((u.log() - (-u).log1p() + log_alpha) / BETA).sigmoid()
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def cdf(value: float, log_alpha: Tensor) -> Tensor:
    """Return Q(value) = P(s (zeta - gamma) + gamma <= value), before the clamp, for gamma < value < zeta.

    Q(x) = sigmoid(beta (log(x - gamma) - log(zeta - x)) - log alpha)
    """
    return (BETA * (math.log(value - GAMMA) - math.log(ZETA - value)) - log_alpha).sigmoid()


def nonzero_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def one_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z = 1) = 1 - sigmoid(beta log((1 - gamma) / (zeta - 1)) - log alpha)."""
    return (log_alpha - BETA * math.log((1 - GAMMA) / (ZETA - 1))).sigmoid()


def hard_concrete(log_alpha: Tensor, training: bool = False) -> Tensor:
    """Return gates like ``log_alpha``: drawn in training (see ``drawn_with``), else those of evaluation."""
    if not training:
        return gate_at_test(log_alpha)
    if _draw is None:
        return gate_sample(log_alpha, torch.rand_like(log_alpha))
    u = torch.rand(log_alpha.shape, dtype=log_alpha.dtype, generator=_draw())
    return gate_sample(log_alpha, u.to(log_alpha.device))


_draw: Callable[[], torch.Generator] | None = None


@contextmanager
def drawn_with(seed: int) -> Iterator[None]:
    """Draw gates by a generator of their own: there is one draw a mini-batch, whichever process has which examples."""
    global _draw
    before, _draw = _draw, cache(lambda: torch.Generator().manual_seed(seed))  # made for the first gate
    try:
        yield
    finally:
        _draw = before


_LIBRARY.impl("hard_concrete", hard_concrete, "CompositeImplicitAutograd")
HARD_CONCRETE = torch.ops.kfe_fx.hard_concrete.default


@rule(HARD_CONCRETE)
def gates(tracker: Tracker, node: fx.Node) -> Any:
    """Refuse to say what can be removed; where examples are followed, gates are the same for all."""
    if tracker.relocates:
        raise UnsupportedModel(
            "this network has hard concrete gates, which go before any unit does: finalise-gates folds them into "
            "the weights (kfe-fx rewrite MODEL finalise-gates -o FILE), strip-gates takes them out"
        )
    return ((),)


@rule(GATE)
def gated_value(tracker: Tracker, node: fx.Node) -> Any:
    """Follow examples past a gate; there is no rule for units."""
    return None if tracker.relocates else tracker.dims(node.args[0])


def learned(program: Program) -> dict[int, nn.Parameter]:
    """Return log alpha by the id of the group of units that it gates, [units of the group]; empty without gates."""
    held = program.module()._modules.get(MODULE)
    found: dict[int, nn.Parameter] = {}
    if held is None or not any(_draws(graph) for graph in program.graphs.values()):
        return found
    for name, child in held.named_children():
        value = child._parameters.get("log_alpha")
        if value is not None and name.isdecimal():
            found[int(name)] = value
    return dict(sorted(found.items()))


def _draws(graph: fx.Graph) -> bool:
    return bool(graph.find_nodes(op="call_function", target=HARD_CONCRETE))


def insert_learned(
    program: Program, *, heads: str = "auto", drop_rate: float = DROP_RATE, seed: int = 0
) -> dict[str, Any]:
    """Gate the units of a Program with hard concrete gates, in place, and return facts.

    Each group of units has one parameter log alpha ~ N(log(1 - p) - log p, 0.01^2). A Program without a training graph
    gets one, since gates are drawn in training alone. A group with a site that a gate cannot stand at has none, and
    ``left_out`` says why.

    Args:
        program: the network; its graphs change, its own tensors do not.
        heads: as for ``analyze``.
        drop_rate: p, the share of gates to be off at the start, above 0 and below 1.
        seed: of log alpha.

    Returns:
        Facts: ``gates`` (groups), ``units``, ``sites``, and ``left_out`` (name of a group -> why).

    Raises:
        UsageError: there are gates already, or the drop rate means nothing.
    """
    if has_gates(program):
        raise UsageError("this network has gates already; strip-gates takes them out, finalise-gates folds them in")
    if not 0 < drop_rate < 1:
        raise UsageError(f"the drop rate of gates is {drop_rate}; give a share above 0 and below 1")
    analysis = analyze(program, heads=heads)
    left_out: dict[int, str] = {}
    for mode, graph in program.graphs.items():
        for site in missing_sites(graph, analysis):
            left_out.setdefault(group_at(site, analysis), f"no gate can stand at {site.node} of the {mode} graph")
    sited = {group_at(site, analysis) for site in analysis.gate_sites}
    left_out |= {group.id: "it is a state from outside" for group in analysis.groups if group.id not in sited}
    named = {analysis.groups[group].name: why for group, why in left_out.items()}
    chosen = [group for group in analysis.groups if group.id not in left_out]
    facts = {"gates": len(chosen), "units": sum(len(group.units) for group in chosen), "sites": 0, "left_out": named}
    if not chosen:
        return facts
    module = program.module()
    added = "train" not in program.graphs
    if added:
        module.graphs["train"] = copy_graph(module.graphs["eval"])
        outputs = module.signature.outputs
        module.signature = replace(module.signature, outputs={**outputs, "train": outputs["eval"]})
    sites = [site for site in analysis.gate_sites if group_at(site, analysis) not in left_out]
    generator = torch.Generator().manual_seed(seed)
    for group in chosen:
        first = next(site for site in sites if group_at(site, analysis) == group.id)
        drawn = torch.randn(len(group.units), generator=generator, dtype=torch.float64) * SIGMA
        value = drawn + math.log(1 - drop_rate) - math.log(drop_rate)
        like = _like(analysis, first)
        put_tensor(module, _name(group.id), nn.Parameter(value.to(like.device, _real(like.dtype))))
    for mode, graph in module.graphs.items():
        _insert(graph, analysis, sites, [group.id for group in chosen], training=mode == "train")
    module.recompile()
    told = {**program.extras.get("sections", {}), SECTION: {"heads": heads, "training_added": added}}
    program.extras["sections"] = told
    return {**facts, "sites": len(sites)}


def _name(group: int) -> str:
    return f"{MODULE}.{group}.log_alpha"


def _like(analysis: Analysis, site: GateSite) -> Tensor:
    """Return a tensor of the type and on the device of what is gated."""
    fake = analysis.trackers["eval"].fakes[site.node]
    value = fake[0] if isinstance(fake, list | tuple) else fake
    devices = [parameter.device for parameter in analysis.program.module().parameters()]
    return torch.empty(0, dtype=value.dtype, device=devices[0] if devices else "cpu")


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype.to_real(), torch.float32)  # half types are too coarse for steps of log alpha


def _insert(graph: fx.Graph, analysis: Analysis, sites: list[GateSite], groups: list[int], *, training: bool) -> None:
    nodes = {node.name: node for node in graph.nodes}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    drawn: dict[int, fx.Node] = {}
    with graph.inserting_before(first):
        for group in groups:
            held = graph.create_node("get_attr", _name(group))
            drawn[group] = graph.call_function(HARD_CONCRETE, (held, training))
    for site in sites:
        if site.argument is None:
            gate_after(graph, nodes[site.node], site, analysis, drawn)
        else:
            _gate_layer(graph, nodes[site.node], site, analysis, drawn)
    graph.lint()


def _gate_layer(
    graph: fx.Graph, node: fx.Node, site: GateSite, analysis: Analysis, drawn: Mapping[int, fx.Node]
) -> None:
    """Gate what is read of the units of a recurrent layer: columns of its own weight, and its outputs."""
    call = Arguments.of(node)
    given, _, index, *_ = gate_arguments(site, analysis, drawn)
    outputs: dict[int, int] = {}  # which output -> its dim
    if site.argument == "gate" and call.weight_hr is not None:
        weight, dim = "weight_hr", 0  # rows of the projection make the output and the state alike
    elif site.argument == "gate":
        weight, dim, outputs = "weight_hh", 1, {0: 2, 1: 1}
    else:
        weight, dim = "weight_hr", 1
    if call.cell == "lstm" and not (site.argument == "gate" and call.weight_hr is not None):
        outputs[2] = 1
    old = getattr(call, weight)
    with graph.inserting_before(node):
        made = graph.call_function(GATE, (old, given, dim, index))
    made.meta = dict(node.meta)
    set_argument(node, weight, made, old)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] in outputs:
            with graph.inserting_after(user):
                gated = graph.call_function(GATE, (user, given, outputs[user.args[1]], index))  # type: ignore[index]
            gated.meta = dict(user.meta)
            user.replace_all_uses_with(gated, delete_user_cb=lambda other, gated=gated: other is not gated)


def remove_learned(program: Program) -> int:
    """Take hard concrete gates out of a Program, in place, and return how many sites they had.

    The graphs are those before ``insert_learned``, node for node.
    """
    module = program.module()
    count = sum(strip(graph, module.signature.input_names) for graph in module.graphs.values())
    forget(program)
    return count


def forget(program: Program) -> None:
    """Drop, in place, what is kept beside the gates: log alpha, the section, a training graph that was added."""
    module = program.module()
    for group in learned_names(program):
        module._modules[MODULE]._modules.pop(group)  # type: ignore[union-attr]
    held = module._modules.get(MODULE)
    if held is not None and not any(True for _ in held.parameters()) and not any(True for _ in held.buffers()):
        del module._modules[MODULE]
    if _section(program).get("training_added") is True and "train" in module.graphs:
        del module.graphs["train"]
        module.signature = replace(module.signature, outputs={"eval": module.signature.outputs["eval"]})
    sections = {name: value for name, value in program.extras.get("sections", {}).items() if name != SECTION}
    program.extras = {name: value for name, value in program.extras.items() if name != "sections"}
    if sections:
        program.extras["sections"] = sections
    module.recompile()


def learned_names(program: Program) -> list[str]:
    """List what log alpha lies in, by the names of the groups."""
    held = program.module()._modules.get(MODULE)
    return [] if held is None else [name for name, child in held.named_children() if "log_alpha" in child._parameters]


def _section(program: Program) -> dict[str, Any]:
    found = program.extras.get("sections", {}).get(SECTION)
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Learned:
    """Hard concrete gates and the units that they gate: ``log_alpha[group]`` is in the order of the group's units.

    ``analysis`` is of the network without gates (``analysis.program``), which shares its tensors.
    """

    analysis: Analysis
    heads: str
    log_alpha: dict[int, nn.Parameter]

    @classmethod
    def of(cls, program: Program) -> Learned:
        """Find the gates of a Program.

        Raises:
            UsageError: there are none, or they are those of another network.
        """
        found = learned(program)
        if not found:
            raise UsageError("this network has no hard concrete gates; insert-gates{mode=hard_concrete} sets them")
        bare = program.sharing()
        remove_learned(bare)
        heads = str(_section(program).get("heads", "auto"))
        analysis = analyze(bare, heads=heads)
        for group, value in found.items():
            if group >= len(analysis.groups) or value.shape != (len(analysis.groups[group].units),):
                raise UsageError(f"the gates {_name(group)!r} do not fit the units of this network; insert them anew")
        return cls(analysis, heads, found)

    def units(self) -> list[int]:
        """List the gated units, in the order of ``values``."""
        return [unit for group in self.log_alpha for unit in self.analysis.groups[group].units]

    def values(self) -> Tensor:
        """Return log alpha of all gated units, [units]; differentiable."""
        return torch.cat([value.reshape(-1) for value in self.log_alpha.values()])

    @torch.no_grad()
    def at_test(self) -> dict[int, float]:
        """Return zhat of each gated unit."""
        return dict(zip(self.units(), gate_at_test(self.values()).tolist(), strict=True))
