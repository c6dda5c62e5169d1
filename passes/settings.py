"""What the user asked a pruning run for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kfe_fx.cost.bounds import Bounds
from kfe_fx.cost.budget import Limit
from kfe_fx.cost.predictors import predictor

if TYPE_CHECKING:
    from kfe_fx.cost.count import CostModel
    from kfe_fx.cost.device import Device
    from kfe_fx.cost.latency import LatencyModel
    from kfe_fx.cost.predictors import Spec
    from kfe_fx.plan import Plan


@dataclass(frozen=True)
class Settings:
    """The arguments of ``kfe_fx.prune``, checked; the first of ``limits`` is the one that is reported as the budget."""

    limits: tuple[Limit, ...]
    criterion: Any
    loss: Any
    evaluate: Any
    epochs: int | None
    lr: float | None
    batch_size: int
    optimizer: str
    rounds: int | None
    multiple_of: int | None
    threads: int
    batch: int
    keep: tuple[str, ...]
    heads: str
    seed: int
    resize_state: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    depth: bool = True
    provider: str = "CPUExecutionProvider"
    precision: str = "fp32"
    target: Device | None = None
    cost_model: Spec = "roofline"
    plan: Plan | None = None
    repair: str = "auto"
    decompose: bool = False
    schedule: str = "exponential"
    penalty: float = 0.0
    crowding: float | None = None
    distil: float = 0.0
    temperature: float | None = None
    features: tuple[str, ...] = ()
    ewc: float | None = None
    store: Any = field(default=None, repr=False)
    stop_at_loss: float | None = None
    stop_at_accuracy: float | None = None

    @property
    def metric(self) -> str:
        """The metric of the first limit."""
        return self.limits[0].metric

    @property
    def stops(self) -> bool:
        """Whether a floor may end the rounds."""
        return self.stop_at_loss is not None or self.stop_at_accuracy is not None

    @property
    def measures(self) -> bool:
        """Whether the budget is one of latency that is measured here; for another device it is predicted."""
        return self.metric == "latency" and self.target is None

    def predictor(self, model: CostModel, device: Device) -> LatencyModel:
        """Return what predicts the latency of a network on a device."""
        return predictor(model, device, self.cost_model)
