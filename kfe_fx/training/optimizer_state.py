"""Optimisers of Programs: made, and carried through a removal with their state."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from kfe_fx.errors import UsageError
from kfe_fx.plan import Plan
from kfe_fx.program import Program

_DEFAULT_RATES = {"adamw": 1e-3, "sgd": 1e-2}
WEIGHT_DECAY = {"adamw": 1e-2, "sgd": 5e-4}


def make_optimizer(program: Program, name: str = "adamw", lr: float | None = None) -> torch.optim.Optimizer:
    """Make an optimiser of the Program's parameters.

    Matrices and filters decay (AdamW 0.01, SGD 0.0005), vectors (biases, affine parameters) do not. SGD has the
    Nesterov momentum 0.9.

    Args:
        program: the network; parameters that need no gradient are left out.
        name: "adamw" or "sgd".
        lr: learning rate; 0.001 for AdamW and 0.01 for SGD if not given.

    Raises:
        UsageError: there is no such optimiser.
    """
    if name not in _DEFAULT_RATES:
        raise UsageError(f"there is no optimizer {name!r}; choose adamw or sgd, or give one of torch.optim")
    trained = [parameter for parameter in program.module().parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY[name]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = _DEFAULT_RATES[name] if lr is None else lr
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)


def slice_optimizer(
    optimizer: torch.optim.Optimizer, before: Program, after: Program, plan: Plan
) -> torch.optim.Optimizer:
    """Return the optimiser of the small network that goes on where the one of the large network was.

    State of a parameter's shape (momentum, moments) is sliced as the parameter was, single numbers (step counts) are
    copied; a parameter with state of any other shape (factored moments) starts anew. Groups keep their options.

    Args:
        optimizer: of parameters of ``before``; it stays as it was.
        before: the Program before the removal.
        after: the Program after it.
        plan: what was removed.

    Returns:
        A new optimiser of the same class.

    Raises:
        UsageError: the optimiser holds a parameter that is not the Program's, or is one that keeps its history as a
            whole (LBFGS).
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError("LBFGS keeps one history over all parameters, which cannot be sliced; make a new optimizer")
    names: dict[int, str] = {}
    for name, parameter in before.module().named_parameters():  # tied parameters once, under their first name
        names[id(parameter)] = name
    groups: list[dict[str, Any]] = []
    state: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        renewed = []
        for old in group["params"]:
            if id(old) not in names:
                raise UsageError(
                    "the optimizer holds a parameter that is not this Program's; make it of program.module()"
                )
            name = names[id(old)]
            new = after.tensor(name)
            renewed.append(new)
            if optimizer.state.get(old):
                kept = plan.kept.get(name, [])
                sliced = {key: _slice(value, old, kept) for key, value in optimizer.state[old].items()}
                if not any(isinstance(value, _Unknown) for value in sliced.values()):
                    state[new] = sliced
        groups.append({**group, "params": renewed})
    twin = object.__new__(type(optimizer))
    # the way a pickled optimiser comes back: it restores hooks and whatever its class adds, and calls no constructor
    twin.__setstate__({"defaults": dict(optimizer.defaults), "state": {}, "param_groups": groups})
    twin.state = defaultdict(dict, state)
    return twin


class _Unknown:
    """State that cannot be sliced."""


def _slice(value: Any, parameter: nn.Parameter, kept: list[tuple[int, list[int]]]) -> Any:
    if not isinstance(value, Tensor):
        return value if value is None or isinstance(value, bool | int | float | str) else _Unknown()
    if value.shape == parameter.shape:
        result = value.detach()
        for dim, indices in kept:
            result = result.index_select(dim, torch.tensor(indices, device=value.device))
        return result if kept else result.clone()
    return value.detach().clone() if value.numel() == 1 else _Unknown()
