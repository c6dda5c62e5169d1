"""Who sees which examples: calibration to score and measure, training to fine-tune, held out to report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfe_fx.data.dataset import ArrayData
from kfe_fx.data.factory import from_python
from kfe_fx.errors import UsageError

HELD_OUT = 0.2
CALIBRATION = 1024


@dataclass(frozen=True)
class PruneData:
    """The examples of one run of pruning.

    Attributes:
        calibration: scores, means and statistics are measured here; None is data-free.
        training: fine-tuning; None where there is nothing to train on (no data, or no targets).
        held_out: accuracy is reported here; None where there is none. It shares no example with the other two.
        note: one line that says how the data was split.
    """

    calibration: ArrayData | None
    training: ArrayData | None
    held_out: ArrayData | None
    note: str


def arrange(
    data: Any = None,
    val: Any = None,
    sample: Any = None,
    *,
    seed: int = 0,
    fraction: float = HELD_OUT,
    unlabelled: bool = False,
) -> PruneData:
    """Split the data of a run.

    Args:
        data: examples to train on, or None.
        val: examples to hold out; without them a share of ``data`` is held out.
        sample: the calibration sample of a program file, ``(inputs, targets)``, used where there is no ``data``. It was
            part of what the network was trained on, so it never counts as held out.
        seed: of the split.
        fraction: share of ``data`` that is held out without ``val``.
        unlabelled: examples without targets train too: there is a teacher who has all of the loss.

    Returns:
        Which examples are for what. The calibration examples are 1,024 of the training examples, drawn with the seed
        and in random order: whoever takes the first few of them takes a sample too.

    Raises:
        UsageError: there is ``val`` without anything to work on.
    """
    held = None if val is None else from_python(val, "val")
    if data is None:
        calibration = None if sample is None else from_python(tuple(sample), "calibration sample")
        if calibration is None and held is not None:
            raise UsageError("there are validation examples but no data to score and train with; give --data")
        if calibration is not None:
            calibration = calibration.sample(len(calibration), seed + 1)
        told = "data-free: no examples" if calibration is None else f"scored on {calibration.describe()}; no training"
        return PruneData(calibration, None, held, told)
    whole = from_python(data)
    training = whole
    if held is None and whole.targets is not None and len(whole) > 1:
        training, held = whole.split(fraction, seed)
    chosen = training.sample(CALIBRATION, seed + 1)
    shown = "none" if held is None else f"{len(held):,}"
    note = f"{whole.name}: {len(training):,} to train on, {shown} held out, {len(chosen):,} to score with (seed {seed})"
    return PruneData(chosen, training if training.targets is not None or unlabelled else None, held, note)
