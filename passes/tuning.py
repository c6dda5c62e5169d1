"""The fine-tuning of a pruning run: one optimiser through all rounds, and what the dense network still has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kfe_fx.curvature.fit import fit
from kfe_fx.errors import UsageError
from kfe_fx.passes.cutting import State
from kfe_fx.passes.settings import Settings
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.training.distil import Distillation
from kfe_fx.training.features import kept_features, matching, points
from kfe_fx.training.finetune import default_epochs, finetune
from kfe_fx.training.optimizer_state import make_optimizer, slice_optimizer, trained_parameters
from kfe_fx.training.penalties import finest
from kfe_fx.training.prune_data import PruneData

BETWEEN = 0.4  # share of the fine-tuning that goes between the rounds
GENTLE = {"adamw": 3e-4, "sgd": 3e-3}  # default rates where repair has fitted the weights: larger ones undo it first
CURVATURE_EXAMPLES = 256  # of the elastic penalty


@dataclass
class Tuner:
    """Trains the small network of a run for its share of all steps; the dense one is the teacher where it is asked to.

    The optimiser goes on over removals with what is left of its state, and anew where branches went.
    """

    settings: Settings
    data: PruneData
    dense: Program
    progress: Callable[[str, float | None], None]
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        """Refuse what is said of a fine-tuning that there is none of, and one of nothing, before the long work.

        Raises:
            UsageError: epochs, a rate, a teacher, its features or an elastic penalty without training data or epochs;
                or every parameter is frozen.
        """
        if self.trains:
            trained_parameters(self.dense)
        asked = {name: getattr(self.settings, name) for name in ("epochs", "lr", "distil", "features", "ewc")}
        if not self.trains and any(asked.values()):
            named = ", ".join(name for name, value in asked.items() if value)
            raise UsageError(
                f"{named}: nothing is fine-tuned here; give training data with targets (distil=1 needs none) and "
                "epochs, or leave it out"
            )

    @property
    def trains(self) -> bool:
        """Whether there is anything to train on, and leave to."""
        return self.data.training is not None and self.settings.epochs != 0

    def steps(self, rounds: int, *, last: bool) -> int:
        """Return how many steps one of several rounds gets."""
        training, settings = self.data.training, self.settings
        assert training is not None
        epochs = settings.epochs if settings.epochs is not None else default_epochs(len(training))
        per_epoch = max(1, len(training) // settings.batch_size)
        share = 1.0 if rounds == 1 else (1 - BETWEEN) if last else BETWEEN / (rounds - 1)
        return max(1, round(epochs * per_epoch * share))

    def follow(self, before: State, after: State, step: Plan) -> None:
        """Cut the optimiser's state as the network was cut."""
        if after.shallow is not before.shallow:
            self.optimizer = None
        elif self.optimizer is not None:
            self.optimizer = slice_optimizer(self.optimizer, before.small, after.small, step)

    def run(self, state: State, steps: int, seed: int, penalties: Any = None, program: Program | None = None) -> Any:
        """Train in place and return the facts; ``program`` is another view of the same tensors to run."""
        settings = self.settings
        if self.optimizer is None:
            gentle = GENTLE[settings.optimizer] if settings.repair == "auto" else None
            self.optimizer = make_optimizer(state.small, settings.optimizer, settings.lr or gentle)
        return finetune(
            program or state.small,
            self.data.training,
            settings.loss,
            steps=steps,
            batch_size=settings.batch_size,
            optimizer=self.optimizer,
            schedule="cosine",
            seed=seed,
            progress=self.progress,
            teacher=self._teacher(state),
            ewc=self._held(state),
            penalties=penalties,
        )

    def _common(self, state: State) -> list[str]:
        """Name the activations that the dense network has too: those inside of a decomposed layer are new."""
        layers = tuple(f"{name}." for name in state.plan.decomposed)
        inside = {n.name for n in state.small.graphs["eval"].nodes if f"{n.meta.get('module')}.".startswith(layers)}
        heard = points(self.dense)
        return [name for name in points(state.small) if name in heard and name not in inside]

    def _teacher(self, state: State) -> Distillation | None:
        settings = self.settings
        if not settings.distil:
            return None
        features: Any = None
        if settings.features:
            names = matching(self._common(state), settings.features)
            features = kept_features(state.shallow.program, state.plan, names)
        return Distillation(self.dense, settings.distil, settings.temperature, features=features)

    def _held(self, state: State) -> Any:
        settings, sample = self.settings, self.data.calibration
        if not settings.ewc or sample is None:
            return None
        store = fit(
            state.small, sample.first(CURVATURE_EXAMPLES), settings.loss, statistics="ekfac",
            batch_size=settings.batch_size, seed=settings.seed,
        )  # fmt: skip
        # as an operator: what is trained may be another view of the same tensors, whose graph is another one
        return store.operator(state.small, finest(store)), settings.ewc
