"""Which whole branches of a network go, by what is lost with them after repair."""

from __future__ import annotations

from collections.abc import Callable

from kfe_fx.passes.selecting import Selector

PATIENCE = 2  # branches that may be tried in vain

Names = tuple[str, ...]


def choose_branches(
    selector: Selector,
    ratios: dict[str, float],
    harm: Callable[[str], float],
    judge: Callable[[Names], tuple[bool, float]],
    tolerance: float,
) -> Names:
    """Choose by trial: the sum of the scores of its units says little of a whole branch.

    The first branches in the order of harm per cost saved, as many as lower the loss on the calibration examples, or as
    the budget needs.

    Args:
        selector: of the network; it knows the branches.
        ratios: the budgets, the first of which is the run's.
        harm: by how much the loss grows when a branch gives its mean instead.
        judge: of a choice, (the budget is out of reach with it, loss after repair); the smaller the better.
        tolerance: branches that alone save more than this beyond the budget are none.
    """
    metric, budget = next(iter(ratios.items()))
    best: Names = ()
    path, in_vain = best, 0
    found: dict[Names, tuple[bool, float]] = {best: judge(best)}
    for name in selector.by_price({name: harm(name) for name in selector.branches}, ratios):
        if in_vain == PATIENCE and not found[best][0]:
            break
        if not selector.fit((*path, name)):
            continue
        path = (*path, name)
        left = selector.ratio(metric, selector.units(path), path)
        if left < budget * (1 - tolerance) and not found[best][0]:
            break  # these branches alone save more than was asked for
        found[path] = judge(path)
        better = found[path] < found[best]
        best, in_vain = (path, 0) if better else (best, in_vain + 1)
    return best
