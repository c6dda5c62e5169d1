"""What predicts latency, by name: the roofline, and models of third parties; everything that predicts asks here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from kfe_fx.cost.latency import LatencyModel, RooflineLatency
from kfe_fx.errors import UsageError
from kfe_fx.user_code import load_function

if TYPE_CHECKING:
    from kfe_fx.cost.count import CostModel
    from kfe_fx.cost.device import Device
    from kfe_fx.cost.profile import Profile

# a class of predictors, or a function that makes one: (model, device) -> LatencyModel; no device: as built in
Factory = Callable[..., LatencyModel]
Spec = str | Factory
ROOFLINE = RooflineLatency.name

P = TypeVar("P", bound=Factory)
_REGISTRY: dict[str, Factory] = {}


def register(factory: P) -> P:
    """Make a predictor known under the ``name`` of its class; use it as a decorator.

    Raises:
        UsageError: it has no name, or the name is taken by another one.
    """
    name = getattr(factory, "name", None)
    if not isinstance(name, str) or not name:
        raise UsageError("a cost model is registered under its name; give its class the attribute name = '...'")
    if _REGISTRY.setdefault(name, factory) is not factory:
        raise UsageError(f"there is a cost model {name!r} already; choose another name")
    return factory


register(RooflineLatency)


def names() -> tuple[str, ...]:
    """List the names of the predictors."""
    return tuple(sorted(_REGISTRY))


def resolve(spec: Spec) -> Factory:
    """Return the predictor of that name, the one that "file.py:Class" names, or the given class or function.

    Raises:
        UsageError: there is none.
    """
    if isinstance(spec, str):
        if ":" in spec:
            return load_function(spec)
        if spec in _REGISTRY:
            return _REGISTRY[spec]
    elif callable(spec):
        return spec
    raise UsageError(f"there is no cost model {spec!r}; choose one of {', '.join(names())}, or give file.py:Class")


def predictor(model: CostModel, device: Device | Profile | None = None, spec: Spec = ROOFLINE) -> LatencyModel:
    """Make what predicts the latency of the network of ``model`` on ``device``.

    Raises:
        UsageError: there is no such cost model, or what it makes predicts nothing.
    """
    made: Any = resolve(spec)(model, device)
    lacking = [part for part in ("name", "predict", "terms") if not hasattr(made, part)]
    if lacking:
        raise UsageError(f"the cost model {spec!r} makes something without {lacking[0]}; see kfe_fx.cost.latency")
    return made
