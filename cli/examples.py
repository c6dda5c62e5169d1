"""Examples that --data and --val name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfe_fx.data import ArrayData


def load_examples(spec: str | None) -> ArrayData | None:
    """Load them, or give None where the option was not given."""
    if spec is None:
        return None
    from kfe_fx.data import load_data

    return load_data(spec)
