"""Criteria ``lm``, ``qm``, ``obd`` and ``taylor-so``: what the loss becomes by a model of it around the weights of now.

Laurent, C. Ballas, George, N. Ballas, Vincent, "Revisiting Loss Modelling for Unstructured Pruning" (2020), section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from kfe_fx.criteria import synthetic
from kfe_fx.criteria.base import Criterion, ScoreContext, register
from kfe_fx.criteria.gradients import (
    DATA_FREE_EXAMPLES,
    Source,
    curvature_columns,
    curvature_kind,
    gate_curvatures,
)
from kfe_fx.curvature.fit import fit
from kfe_fx.errors import BadData
from kfe_fx.program import Program, put_tensor
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batch, Batches, pinned_batch
from kfe_fx.training.likelihood import Likelihood
from kfe_fx.training.losses import Loss, Settling, cut


class LossModel(Criterion):
    """Score by the change of the mean loss that a Taylor model predicts when theta_k, or a gate, goes to zero.

        change_k = - g_k theta_k + 1/2 H_kk theta_k^2        (theta_k = 1 for a gate)

    g is the gradient of the mean loss in evaluation mode, without weight decay, and H the generalised Gauss-Newton
    matrix of which the diagonal is taken exactly over the classes (``Likelihood.columns``) up to 20 outputs, with
    sampled labels above. ``first`` and ``second`` say which of the two terms a model has. Scores are absolute values:
    where a model promises that the loss falls, it is far outside of where it holds. What it promises stays signed.
    """

    predicts: ClassVar[bool] = True
    first: ClassVar[bool]
    second: ClassVar[bool]

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return |change| of each unit by its gate, the members of a unit summed before squaring, [units]."""
        gradient, curvature = torch.zeros(2, len(context.analysis.units), dtype=torch.float64)
        count = 0
        passed = _gates(context) if self.second else ((rows, torch.zeros_like(rows)) for rows in context.gradients())
        for rows, squares in passed:
            gradient += rows.sum(0)
            curvature += squares.sum(0)
            count += len(rows)
        change = self.change(gradient / max(count, 1), curvature / max(count, 1))
        context.changes = change.numpy()
        return change.abs().numpy()

    def weights(self, context: ScoreContext) -> dict[str, Tensor]:
        """Return |change| of each single weight; see ``changes``."""
        return {name: change.abs() for name, change in self.changes(context).items()}

    def changes(self, context: ScoreContext) -> dict[str, Tensor]:
        """Return the signed change of the mean loss per entry of each weight, float64 of the weight's shape.

        Without examples inputs are drawn. A weight that no statistics cover (``find_blocks`` says which and why) gets
        its curvature by autograd, an example at a time; one that reaches no output has both terms zero, which is exact.

        Raises:
            BadData: there are targets but no loss, or derivatives that are not finite.
        """
        weights = {name: weight.detach().double() for name, weight in context.weights().items()}
        data = examples_of(context)
        gradients = mean_gradients(context.program, data, context.loss, list(weights)) if self.first else {}
        curvatures = mean_curvatures(context, data, list(weights)) if self.second else {}
        changes = {}
        for name, weight in weights.items():
            first = gradients[name].mul_(weight) if self.first else torch.zeros_like(weight)
            second = curvatures[name].mul_(weight.square()) if self.second else torch.zeros_like(weight)
            changes[name] = self.change(first, second)
        return changes

    def change(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the change of the loss, given g_k theta_k and H_kk theta_k^2, which are tensors of one shape."""
        return 0.5 * self.second * second - self.first * first


@register
class LinearModel(LossModel):
    """LM: |g_k theta_k|, of the mean gradient (not the mean of |g_nk|, which is ``taylor``)."""

    name: ClassVar[str] = "lm"
    needs: ClassVar[frozenset[str]] = frozenset({"targets"})  # under labels of the network itself the mean is zero
    first, second = True, False


@register
class QuadraticModel(LossModel):
    """QM: |-g_k theta_k + 1/2 H_kk theta_k^2|."""

    name: ClassVar[str] = "qm"
    needs: ClassVar[frozenset[str]] = frozenset({"targets"})
    first, second = True, True


@register
class OptimalBrainDamage(LossModel):
    """OBD: 1/2 H_kk theta_k^2 (LeCun, Denker, Solla 1990), which takes the gradient to be zero and needs no targets."""

    name: ClassVar[str] = "obd"
    first, second = False, True


@register
class SecondOrderTaylor(Criterion):
    """Score units by mean_n |-g[n, u] + 1/2 h[n, u]|: ``taylor`` with the second-order term of each example.

    Molchanov et al. 2019, section 3.1, with the generalised Gauss-Newton matrix for the Hessian. What it promises of
    the mean loss is mean_n (-g[n, u] + 1/2 h[n, u]), as ``qm``.

    Single weights are scored by mean_n |-g[n, k] theta_k + 1/2 h[n, k] theta_k^2|.
    """

    name: ClassVar[str] = "taylor-so"
    predicts: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return the mean over examples, [units]."""
        total, signed = torch.zeros(2, len(context.analysis.units), dtype=torch.float64)
        count = 0
        for rows, squares in _gates(context):
            changes = 0.5 * squares - rows
            total += changes.abs().sum(0)
            signed += changes.sum(0)
            count += len(rows)
        context.changes = (signed / max(count, 1)).numpy()
        return (total / max(count, 1)).numpy()

    def weights(self, context: ScoreContext) -> dict[str, Tensor]:
        """Return the mean over examples per entry of each weight, float64; one example at a time, so it takes long."""
        weights = {name: weight.detach().double() for name, weight in context.weights().items()}
        return mean_over_examples(
            context,
            lambda name, first, second: (0.5 * second * weights[name].square() - first * weights[name]).abs(),
            second=True,
        )


def _gates(context: ScoreContext) -> Any:
    return gate_curvatures(
        Source(context.program, context.analysis, context.batches, context.loss, context.seed, context.facts)
    )


def examples_of(context: ScoreContext) -> Batches:
    """Return the examples of a context, or drawn inputs without targets; ``facts`` says which."""
    context.facts["inputs"] = "drawn" if context.batches is None else "data"
    if context.batches is not None:
        return context.batches
    program = context.program
    drawn = synthetic.draw(program, DATA_FREE_EXAMPLES, context.seed, context.facts)
    items = []
    for batch in drawn:
        args, kwargs = pack(program.signature.inputs, batch.inputs)
        named = dict(zip(program.signature.arg_names, args, strict=False)) | kwargs
        items.append((named, None))
    return Batches(program, items, drawn[0].count)


def mean_gradients(program: Program, batches: Batches, loss: Loss | None, names: list[str]) -> dict[str, Tensor]:
    """Return ``g = 1/N sum_n d loss_n / d theta`` of some parameters, in evaluation mode.

    Args:
        program: the network; nothing of it is changed, no ``grad`` is left.
        batches: examples with targets.
        loss: of outputs and targets; what the optimiser would add (weight decay) is no part of it.
        names: of the parameters.

    Returns:
        float64 tensors of the parameters' shapes, zero where the loss does not depend on one.

    Raises:
        BadData: no examples, no targets or no loss, or a gradient is not finite.
    """
    view, leaves = _with_leaves(program, names)
    sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    count, settling = 0, Settling(program, loss)
    for batch in batches:
        if (loss := settling.see(batch)) is None or batch.targets is None:
            raise BadData("the gradient of the loss needs a loss and targets; give --data with targets")
        with torch.enable_grad():
            outputs = _run(view, batch)
            total = loss.total(outputs, batch.targets, batch.count)
        _add(sums, leaves, total, None)
        count += batch.count
    return _means(sums, count)


def mean_curvatures(
    context: ScoreContext, batches: Batches, names: list[str], source: str = "auto"
) -> dict[str, Tensor]:
    """Return the diagonal ``H_kk = 1/N sum_n (J_n^T H_out,n J_n)_kk`` of the generalised Gauss-Newton matrix.

    The statistics "diagonal" of ``kfe_fx.curvature.fit`` with the source "auto": exact up to 20 outputs. The sources
    "empirical" and "sampled" give the mean of the squared gradients, ``1/N sum_n g_nk^2``, by one label per example.

    Args:
        context: the network, the loss and the seed; ``facts`` gets "curvature" and "curvature_by_autograd".
        batches: examples, without targets too.
        names: of parameters.
        source: "auto", "empirical" (the labels of the data) or "sampled" (of the network).

    Returns:
        float64 tensors of the parameters' shapes.

    Raises:
        BadData: no examples, or a derivative is not finite.
    """
    program, facts = context.program, context.facts
    store = fit(
        program, batches, context.loss, statistics="diagonal", source=source, batch_size=batches.batch_size,
        seed=context.seed,
    )  # fmt: skip
    known = {name: weight for name, weight in context.weights().items() if name in names}
    ones = {name: torch.ones_like(value) for name, value in program.module().named_parameters()}
    if store.facts["nonfinite"]:
        block = next(iter(store.facts["nonfinite"]))
        raise BadData(f"the derivatives of the loss by {block} are not finite; check the data and the weights")
    operator = store.operator(program, "diagonal")
    found = operator.matvec(ones)  # F 1 is the diagonal of a diagonal F
    family = store.facts.get("family", "labels of the data")
    facts["curvature"] = f"{store.facts['source']} ({family})"
    facts["examples"] = store.facts["examples"]
    curvatures = {name: found[name].double() for name in known if name in found}
    reasons = {item.parameter: item.reason for item in operator.missing if item.parameter in known}
    if reasons:
        curvatures |= _by_autograd(context, batches, list(reasons), source)
        facts["curvature_by_autograd"] = reasons
    return curvatures


def _by_autograd(context: ScoreContext, batches: Batches, names: list[str], source: str) -> dict[str, Tensor]:
    """Return the same diagonal by a loop over examples, for parameters without statistics."""
    view, leaves = _with_leaves(context.program, names)
    likelihood, settling = Likelihood(context.loss, context.seed), Settling(context.program, context.loss)
    sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    count = 0
    for batch in batches:
        loss = settling.see(batch)
        with torch.enable_grad():
            for outputs, one in _singly(view, batch, likelihood):
                kind = curvature_kind(outputs, one, likelihood) if source == "auto" else source
                for values, column in curvature_columns(kind, outputs, one, loss, likelihood):
                    _add(sums, leaves, values, column, square=True)
        count += batch.count
    return _means(sums, count)


def mean_over_examples(
    context: ScoreContext, term: Callable[[str, Tensor, Tensor], Tensor], *, second: bool = False
) -> dict[str, Tensor]:
    """Return ``1/N sum_n term(name, g_n, h_n)`` of every weight, for terms that are no sums: one example at a time.

    Args:
        context: the network and the examples, or nothing to draw inputs. With targets g_n is the gradient of each
            example's loss on them, without of that on a label drawn from the network; ``facts`` says which.
        term: of the name of a weight, its gradient and the diagonal of its generalised Gauss-Newton matrix.
        second: whether h_n is measured; it is zero otherwise.

    Returns:
        float64 tensors of the weights' shapes.

    Raises:
        BadData: no examples, targets without a loss, or a derivative is not finite.
    """
    batches, likelihood = examples_of(context), Likelihood(context.loss, context.seed)
    settling = Settling(context.program, context.loss)
    view, leaves = _with_leaves(context.program, list(context.weights()))

    def zeros() -> dict[str, Tensor]:
        return {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}

    sums, count = zeros(), 0
    for batch in batches:
        loss = settling.see(batch)
        with torch.enable_grad():
            for outputs, one in _singly(view, batch, likelihood):
                first, squares = zeros(), zeros()
                if one.targets is None:
                    total = likelihood.total(outputs, one)
                else:
                    total = _required(loss).total(outputs, one.targets, 1)
                _add(first, leaves, total, None, keep=True)
                if second:
                    kind = curvature_kind(outputs, one, likelihood)
                    for values, column in curvature_columns(kind, outputs, one, loss, likelihood):
                        _add(squares, leaves, values, column, square=True)
                for name in sums:
                    sums[name] += term(name, first[name], squares[name]).detach()
                context.facts["labels"] = "data" if one.targets is not None else f"sampled ({likelihood.family})"
        count += batch.count
    context.facts["examples"] = count
    return _means(sums, count)


def _required(loss: Loss | None) -> Loss:
    if loss is None:
        raise BadData("there are targets but no loss to take on them; name a --loss")
    return loss


def _singly(view: Program, batch: Batch, likelihood: Likelihood) -> Any:
    """Yield outputs and batch of one example at a time; a network that pins its batch is run once for all of it."""
    if pinned_batch(view) is None:
        likelihood.hold(lambda: _run(view, batch), batch)
        for i in range(batch.count):
            one = batch.rows(i, i + 1)
            yield _run(view, one), one
        return
    outputs = _run(view, batch)
    likelihood.hold(lambda: outputs, batch)
    for i in range(batch.count):
        yield cut(outputs, batch.count, i, i + 1), batch.rows(i, i + 1)


def _with_leaves(program: Program, names: list[str]) -> tuple[Program, dict[str, Tensor]]:
    """Return a view of a Program in which some parameters are leaves of their own, whether they train or not."""
    view = program.sharing().eval()
    leaves: dict[str, Tensor] = {}
    for name in names:
        leaves[name] = nn.Parameter(program.tensor(name).detach())
        for alias in program.names_of(name):
            put_tensor(view.module(), alias, leaves[name])
    return view, leaves


def _run(view: Program, batch: Batch) -> Any:
    module = view.module()
    return pack(module.signature.outputs["eval"], module.run_flat(batch.inputs, "eval"))


def _add(
    sums: dict[str, Tensor],
    leaves: dict[str, Tensor],
    values: Tensor,
    column: Tensor | None,
    *,
    square: bool = False,
    keep: bool = False,
) -> None:
    if not values.requires_grad:
        return
    keep = keep or square
    found = torch.autograd.grad([values], list(leaves.values()), [column], retain_graph=keep, allow_unused=True)
    for name, grad in zip(leaves, found, strict=True):
        if grad is not None:
            sums[name] += grad.double().square() if square else grad.double()


def _means(sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    if not count:
        raise BadData("the data yields no batches to score with; give at least one example")
    for name, total in sums.items():
        total /= count
        if not bool(torch.isfinite(total).all()):
            raise BadData(f"the derivatives of the loss by {name} are not finite; check the data and the weights")
    return sums
