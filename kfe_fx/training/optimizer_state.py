"""Optimisers of Programs: made, and carried through a removal with their state."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from kfe_fx.errors import UsageError
from kfe_fx.plan import Plan
from kfe_fx.program import Program

OPTIMIZERS = ("adamw", "sgd", "ekfac", "kfac")
CURVATURE = ("ekfac", "kfac")
_DEFAULT_RATES = {"adamw": 1e-3, "sgd": 1e-2}  # those of the other two are their own
WEIGHT_DECAY = {"adamw": 1e-2, "sgd": 5e-4, "ekfac": 5e-4, "kfac": 5e-4}


def trained_parameters(program: Program) -> list[nn.Parameter]:
    """Return the parameters that ask for a gradient.

    Raises:
        UsageError: there are none.
    """
    found = [parameter for parameter in program.module().parameters() if parameter.requires_grad]
    if not found:
        raise UsageError(
            "this network has no parameter to train: none asks for a gradient; leave training out (epochs 0), or let "
            "some ask (requires_grad_)"
        )
    return found


def make_optimizer(
    program: Program, name: str = "adamw", lr: float | None = None, **options: Any
) -> torch.optim.Optimizer:
    """Make an optimiser of the Program's parameters.

    Matrices and filters decay (AdamW 0.01, the others 0.0005), vectors (biases, affine parameters) do not. SGD has the
    Nesterov momentum 0.9. EKFAC and KFAC watch the Program's live module until ``close_optimizer``.

    Args:
        program: the network; parameters that need no gradient are left out.
        name: "adamw", "sgd", "ekfac" or "kfac".
        lr: learning rate; if not given 0.001 for AdamW, 0.01 for SGD, and what ``kfe_fx.optim`` says for the others.
        options: more arguments of the optimiser; those that are None are left out.

    Raises:
        UsageError: there is no such optimiser, it does not take one of the options, or nothing is to be trained.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"there is no optimizer {name!r}; choose {', '.join(OPTIMIZERS)}, or give one of torch.optim")
    given = {key: value for key, value in options.items() if value is not None}
    if given and name not in CURVATURE:
        raise UsageError(f"{name} takes no {next(iter(given))}; that is for {' and '.join(CURVATURE)}")
    trained = trained_parameters(program)
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY[name]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if lr is not None or name not in CURVATURE:
        given["lr"] = _DEFAULT_RATES[name] if lr is None else lr
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=given["lr"])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=given["lr"], momentum=0.9, nesterov=True)
    from kfe_fx import optim  # it is made of curvature, which reads data by way of this package

    return (optim.EKFAC if name == "ekfac" else optim.KFAC)(program, groups, **given)


def close_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser that watches its network go; others have nothing to close."""
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()


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
            whole (LBFGS) or statistics of layers (EKFAC, KFAC).
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError("LBFGS keeps one history over all parameters, which cannot be sliced; make a new optimizer")
    if hasattr(optimizer, "close"):
        kind = type(optimizer).__name__
        raise UsageError(f"{kind} keeps statistics of whole layers, which cannot be sliced; make a new optimizer")
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
