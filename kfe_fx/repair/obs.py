"""Compensation for removed units out of captured curvature: Optimal Brain Surgeon on whole rows and columns jointly."""

from __future__ import annotations

import torch
from torch import Tensor

from kfe_fx.criteria.members import COLUMNS, ROWS, outputs_of
from kfe_fx.curvature.block_operator import TIKHONOV, check_damping
from kfe_fx.curvature.blocks import Block, Blocks, find_blocks
from kfe_fx.curvature.store import Store
from kfe_fx.errors import PlanError, UsageError
from kfe_fx.plan import Plan
from kfe_fx.program import Program

DAMPING = 1e-3
INPUTS, OUTPUTS, BOTH = SIDES = ("inputs", "outputs", "both")


def obs_weights(
    program: Program,
    store: Store,
    plan: Plan,
    *,
    damping: float = DAMPING,
    sides: str = INPUTS,
    blocks: Blocks | None = None,
) -> dict[str, Tensor]:
    """Return the weights that make good what a plan removes, as far as the captured curvature tells.

    For each block W [o, i] with Kronecker factors G and A, of which rows K_r and columns K_c stay and all the others
    go at once, the exact minimiser of what the loss rises by (see ``compensated``):

        min over W' of 1/2 tr(G E A E^T),    E = W' - W,    W' = 0 but for W'[K_r, K_c]

    It is Kron-OBS (Wang et al. 2019, section 3.2) for whole sets of units on both sides. The bias is the last column,
    which always stays: it takes over what the removed inputs sent on the average. ``Plan.of_units(analysis, removed)``
    makes the plan of some units.

    Args:
        program: the network before the removal.
        store: its statistics "kfac" (``kfe_fx.curvature.fit``), of these very weights.
        plan: what goes, in the indices of ``program``.
        damping: times the mean eigenvalue of each factor, added to it: less motion where little was measured.
        sides: what weights move for. "inputs": columns of inputs that they lose (Y = 0), which is least squares on the
            captured inputs and needs no model of the loss. "outputs": rows of their own layer (X = 0), as Kron-OBS.
            "both": the minimiser per block. Over a whole network that overshoots: a removed unit is made good by the
            rows beside it and again by those who read it, because the blocks know nothing of each other.
        blocks: those of ``find_blocks`` where they are known already.

    Returns:
        Tensors in the shapes and types of the small network for all parameters that change beyond being cut: weights,
        and the biases that belong to their blocks. Each name of tied parameters has its own entry. Blocks that are not
        cut along whole rows and columns, or have no Kronecker factors, stay as they are cut.

    Raises:
        UsageError: the statistics are of another network or older than the weights, or hold no factors, an option means
            nothing, or without damping a factor has no inverse.
        PlanError: the plan is of another network.
    """
    check_damping(damping, TIKHONOV, has_factors=True)
    if sides not in SIDES:
        raise UsageError(f"there are the sides {', '.join(SIDES)}, not {sides!r}")
    store.check(program, weights=True)
    found = [block for block in (blocks or find_blocks(program)).blocks if block.kind == "kronecker"]
    if found and not any({"A", "G"} <= store.blocks[block.name].sums.keys() for block in found):
        raise UsageError("the curvature statistics given lack 'kfac'; fit them with it")
    names = {name for block in found for name in block.parameters}
    before = {name: program.tensor(name).detach() for name in names}
    after, masks = {name: value.double().clone() for name, value in before.items()}, _masks(before, plan)
    changed: set[str] = set()
    with torch.no_grad():
        for block in found:
            if any(name in masks for name in block.parameters) and _compensate(
                block, store, after, masks, damping, sides
            ):
                changed |= set(block.parameters)
    aliases = {name: program.names_of(name) for name in sorted(changed)}
    return {alias: _cut(after[name], name, plan).to(before[name]) for name, known in aliases.items() for alias in known}


def compensated(
    weight: Tensor, A: Tensor | None, G: Tensor | None, rows: Tensor, columns: Tensor, damping: float = 0.0
) -> Tensor:
    """Return the minimiser of 1/2 tr(G E A E^T) over E = W' - W with W' zero outside of kept rows and columns, [o, i].

    With K what is kept and R what goes of either side, the gradient (G E A)_KK is zero where W' is free, so that
    G_KK W'_KK A_KK = (G W A)_KK and

        W'_KK = [I  Y] W [I; X],    X = A_RK A_KK^-1 (inputs),    Y = G_KK^-1 G_KR (outputs)

    Args:
        weight: W [o, i].
        A: [i, i], or a diagonal [i] or None: then columns make nothing good (X = 0).
        G: [o, o], or a diagonal [o] or None: then rows do not (Y = 0).
        rows: which rows stay, [o] of bool.
        columns: which columns stay, [i] of bool.
        damping: times the mean eigenvalue of each factor, added to its diagonal.

    Raises:
        UsageError: a factor has no inverse.
    """
    high, wide = _moved(A, columns, damping), _moved(G, rows, damping)
    made = torch.zeros_like(weight)
    left = weight[rows] if wide is None else weight[rows] + wide.mT @ weight[~rows]
    kept = left[:, columns] if high is None else left[:, columns] + left[:, ~columns] @ high
    made[rows.unsqueeze(1) & columns.unsqueeze(0)] = kept.reshape(-1)
    return made


def _moved(factor: Tensor | None, kept: Tensor, damping: float) -> Tensor | None:
    """Return F_RK F_KK^-1, [removed, kept], or None where it is zero."""
    if factor is None or factor.dim() == 1 or bool(kept.all()) or not bool(kept.any()):
        return None
    mean = factor.diagonal().mean()
    level = damping * (mean if float(mean) > 0 else torch.ones_like(mean))
    root, info = torch.linalg.cholesky_ex(factor[kept][:, kept] + level * torch.eye(int(kept.sum())).to(factor))
    if int(info):
        raise UsageError("a Kronecker factor of the curvature has no inverse; give a damping above 0, or more examples")
    return torch.cholesky_solve(factor[kept][:, ~kept], root).mT


def _masks(values: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Return 1 where entries stay and 0 where they go, of the parameters that a plan cuts."""
    masks = {}
    for name, value in values.items():
        mask = torch.ones_like(value, dtype=torch.float64)
        for dim, indices in plan.kept.get(name, ()):
            size = value.shape[dim] if 0 <= dim < value.dim() else 0
            if not all(0 <= index < size for index in indices):
                raise PlanError(f"the plan cuts dim {dim} of {name!r}, which cannot be cut so in this network")
            gone = torch.ones(size, dtype=torch.bool)
            gone[indices] = False
            mask.index_fill_(dim, gone.nonzero().reshape(-1).to(mask.device), 0.0)
        if name in plan.kept:
            masks[name] = mask
    return masks


def _compensate(
    block: Block,
    store: Store,
    after: dict[str, Tensor],
    masks: dict[str, Tensor],
    damping: float,
    sides: str,
) -> bool:
    """Write the compensated weights of a block into tensors of the large shapes; tell whether any entry moved."""
    held = store.blocks[block.name]
    if held.A is None or held.G is None or not block.uses.get("eval"):
        return False
    mask = block.matrix({name: masks.get(name, torch.ones_like(after[name])) for name in block.parameters}) > 0
    mask = mask.cpu()
    rows, columns = mask.any(2), mask[..., : block.shape[2] - (block.bias is not None)].any(1)
    if block.bias is not None:
        columns = torch.cat([columns, rows.any(1, keepdim=True)], 1)
    if not bool((mask == rows.unsqueeze(2) & columns.unsqueeze(1)).all()):
        return False  # what goes of it is no rows and columns
    A, G = held.A.double().cpu(), held.G.double().cpu()
    moves = _moving(block, sides)
    weight = block.matrix(after).cpu()
    new, moved = weight * mask, False
    for group in range(block.shape[0]):
        keep, read = rows[group], columns[group]
        if not bool(keep.any()) or (bool(keep.all()) and bool(read.all())):
            continue
        new[group] = compensated(
            weight[group],
            A[group] if COLUMNS in moves else None,
            G[group] if ROWS in moves else None,
            keep,
            read,
            damping,
        )
        moved = moved or not torch.equal(new[group], weight[group] * mask[group])
    if moved:
        block.put(new.to(after[block.weight].device), after)
    return moved


def _moving(block: Block, sides: str) -> set[str]:
    """Return whether "rows", "columns" or both of a block make good what is lost of their side."""
    made = outputs_of(block)
    read = {COLUMNS if side == ROWS else ROWS for side in made}
    return {ROWS, COLUMNS} if sides == BOTH else set(made) if sides == OUTPUTS else read


def _cut(value: Tensor, name: str, plan: Plan) -> Tensor:
    for dim, indices in plan.kept.get(name, ()):
        value = value.index_select(dim, torch.tensor(indices, dtype=torch.int64, device=value.device))
    return value
