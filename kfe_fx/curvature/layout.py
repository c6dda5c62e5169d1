"""Where the examples of a batch lie in a tensor, and how to bring them to the front."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kfe_fx.errors import BadData


@dataclass(frozen=True)
class Layout:
    """One dim that counts the N examples.

    ``order`` is "plain" (one index each), "outer" (an example's indices lie together, N·k in all: windows, tokens
    folded into the batch), or "inner" (the examples alternate, k·N: time folded before the batch).
    """

    dim: int
    order: str

    def rows(self, value: Tensor, examples: int) -> Tensor:
        """Return [N, ...]: examples first, then k where they are folded, then the other dims in their order.

        One example is all that there is.

        Raises:
            BadData: the dim is no multiple of the number of examples.
        """
        size = value.shape[self.dim]
        if size % examples or (self.order == "plain" and size != examples != 1):
            raise BadData(f"an activation {list(value.shape)} does not hold {examples} examples along dim {self.dim}")
        if self.order == "plain" and size == examples:
            return value.movedim(self.dim, 0)
        if self.order == "outer" or examples == 1:
            split = value.unflatten(self.dim, (examples, size // examples))
            return split.movedim((self.dim, self.dim + 1), (0, 1))
        split = value.unflatten(self.dim, (size // examples, examples))
        return split.movedim((self.dim + 1, self.dim), (0, 1))


def rows(layout: Layout | None, value: Tensor, examples: int) -> Tensor:
    """Return [N, ...] by a layout, or all of ``value`` as the one example that it is."""
    if layout is not None:
        return layout.rows(value, examples)
    if examples != 1:
        raise BadData("this activation mixes examples: they are taken one at a time")
    return value.unsqueeze(0)
