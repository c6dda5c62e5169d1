"""The libraries that benchmarks/curvature.py compares with, each behind the same two calls.

Peers get the layers that they know, in orthogonal bases that are given: Householder reflections.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


@dataclass
class Case:
    """A network with one batch; the loss is mean squared error where targets are real, else cross-entropy.

    ``shared`` says that some layer is called several times.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    shared: bool = False

    def loss(self, outputs: Tensor, reduction: str = "mean") -> Tensor:
        """Return the loss, or with "none" that of each example."""
        made = (F.mse_loss if self.y.is_floating_point() else F.cross_entropy)(outputs, self.y, reduction=reduction)
        return made.flatten(1).mean(1) if made.dim() > 1 else made

    def plain(self) -> None:
        """Go forward and backward."""
        self.module.zero_grad()
        self.loss(self.module(self.x)).backward()

    def layers(self) -> dict[str, Any]:
        """Name the modules that peers know: nn.Linear and nn.Conv2d that are called as modules (attention's is not)."""
        return {name: each for name, each in self.module.named_modules() if type(each) in (nn.Linear, nn.Conv2d)}

    def covers(self) -> float:
        """Return the share of all parameters that these layers hold."""
        held = numel(value for each in self.layers().values() for value in each.parameters())
        return held / numel(self.module.parameters())

    def own(self) -> Case:
        """Return a case with a network of its own: peers change it."""
        return replace(self, module=copy.deepcopy(self.module))

    def ready(self) -> DataLoader:
        """Return a loader of the batch as it is, without the time that collating takes."""
        return DataLoader([[self.x.detach(), self.y]], batch_size=None)  # type: ignore[arg-type]


@dataclass
class Contender:
    """What is timed; ``trace`` is the sum of S* of the layer named "layer" in what ``moments`` returns."""

    factors: Callable[[], Any]
    moments: Callable[[], Any]
    trace: Callable[[Any], float]
    covers: float
    eigh: Callable[[bool], float | None] = lambda always: None


def numel(values: Iterable[Tensor]) -> int:
    """Count the entries of tensors."""
    return sum(value.numel() for value in values)


@functools.cache
def reflection(width: int) -> Tensor:
    """Return a dense orthogonal matrix."""
    normal = F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(width)), dim=0)
    return torch.eye(width) - 2 * normal.outer(normal)


def bases(case: Case, *, grouped: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
    """Return orthogonal matrices for the inputs and outputs of each layer, of all its groups if not ``grouped``."""
    found = {}
    for name, layer in case.layers().items():
        inputs = layer.weight[0].numel() * (1 if grouped else getattr(layer, "groups", 1))
        found[name] = reflection(inputs + (layer.bias is not None)), reflection(len(layer.weight))
    return found


def nngeometry(case: Case) -> Contender:
    """Prepare NNGeometry: a function with one output, the loss of each example, takes one backward pass."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatEKFAC, PMatKFAC

    chosen, loader = LayerCollection(), case.ready()
    for each in case.layers().values():
        chosen.add_layer_from_model(case.module, each)

    def function(x: Tensor, _: Tensor) -> Tensor:
        return case.loss(case.module(x), "none").unsqueeze(1)

    backend = TorchHooksJacobianBackend(model=case.module, function=function, layer_collection=chosen)
    matrix = PMatEKFAC(backend, data=(bases(case, grouped=False), {}))

    def trace(_: None) -> float:
        return float(matrix.data[1]["layer"].sum()) / len(case.x)  # it takes our batch for one example

    return Contender(
        lambda: PMatKFAC(backend, examples=loader), lambda: matrix.update_diag(loader), trace, case.covers()
    )


def kronfluence(case: Case) -> Contender:
    """Prepare kronfluence, with its defaults: iterating over examples or smaller batches take as long."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader as covariances
    from kronfluence.factor.eigen import fit_lambda_matrices_with_loader as lambdas
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    found, covers = bases(case), case.covers()

    class Given(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return case.loss(model(batch[0]), "sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(found)

    eigen: dict[str, dict[str, Tensor]] = {}
    for place, side in enumerate(("activation", "gradient")):
        eigen[f"{side}_eigenvectors"] = {name: pair[place] for name, pair in found.items()}
        eigen[f"{side}_eigenvalues"] = {name: pair[place][0] for name, pair in found.items()}
    first = prepare_model(case.module, Given()), State(cpu=True), Given(), case.ready()
    options = FactorArguments(use_empirical_fisher=True, has_shared_parameters=case.shared)

    def trace(made: Any) -> float:
        return float(made[1]["lambda_matrix"]["layer"].sum() / made[1]["num_lambda_processed"]["layer"])

    return Contender(
        lambda: covariances(*first, options, disable_tqdm=True),
        lambda: lambdas(*first, options, eigen, disable_tqdm=True),
        trace,
        covers,
    )


def curvlinops(case: Case) -> Contender:
    """Prepare curvlinops: weight and bias as one matrix, and no pass over the data but the one that counts."""
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    parameters = [parameter for each in case.layers().values() for parameter in each.parameters()]
    loss = (nn.MSELoss if case.y.is_floating_point() else nn.CrossEntropyLoss)(reduction="sum")
    options = {"fisher_type": "empirical", "kfac_approx": "expand", "separate_weight_and_bias": False}
    options |= {"check_deterministic": False, "num_data": len(case.x), "num_per_example_loss_terms": 1}
    found = bases(case)

    def operator(kind: Any) -> Any:
        return kind(case.module, loss, parameters, [(case.x, case.y)], **options)

    def moments() -> dict[str, Tensor]:
        made = operator(EKFACLinearOperator)
        made._input_covariances_eigenvectors = {name: pair[0] for name, pair in found.items()}
        made._gradient_covariances_eigenvectors = {name: pair[1] for name, pair in found.items()}
        made.compute_eigenvalue_correction()
        return made._corrected_eigenvalues

    def trace(made: dict[str, Tensor]) -> float:
        return float(made["layer"].sum()) / len(case.x)

    return Contender(lambda: operator(KFACLinearOperator).compute_kronecker_factors(), moments, trace, case.covers())


PEERS = {"nngeometry==0.4": nngeometry, "kronfluence==1.0.1": kronfluence, "curvlinops-for-pytorch==3.0.1": curvlinops}
Field = dict[str, Callable[[Case], Contender]]
