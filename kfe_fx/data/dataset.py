"""ArrayData: a whole data set in memory, tensors whose first axis counts examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from kfe_fx.errors import BadData, UsageError

MOST_SEED = 2**40  # a generator takes 64 bits, and passes draw from a million times the seed

Inputs = tuple[Tensor, ...] | dict[str, Tensor]
Redraw = Callable[[int], "ArrayData"]


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Hold examples: inputs [N, ...] each and, where they are known, targets [N, ...].

    Attributes:
        inputs: what the network is called with, positional or by name; dim 0 of every tensor counts examples.
        targets: class indices [N] (int64) or values to regress on (float32); None where there are none.
        name: where the examples come from, for messages.
        classes: names of the classes in the order of their indices, where they are known.
        redraw: draws the same examples as images of another side, in pixels; None where they are not drawn.

    Raises:
        BadData: there are no inputs, no examples, or the lengths differ.
    """

    inputs: Inputs
    targets: Tensor | None = None
    name: str = "data"
    classes: tuple[str, ...] = ()
    redraw: Redraw | None = None

    def __post_init__(self) -> None:
        arrays = dict(self.named_inputs())
        if not arrays:
            raise BadData(f"{self.name}: there is no input array; give at least one")
        if self.targets is not None:
            arrays["targets"] = self.targets
        for key, value in arrays.items():
            if value.ndim == 0:
                raise BadData(f"{self.name}: {key} is a single number; its first axis must count examples")
        lengths = {key: len(value) for key, value in arrays.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise BadData(f"{self.name}: lengths differ: {told}; give every example its inputs and target")
        if len(self) == 0:
            raise BadData(f"{self.name}: holds no examples; give at least one")

    def named_inputs(self) -> list[tuple[str, Tensor]]:
        """List (name, tensor) of the inputs; positional ones are called "inputs" or "inputs[i]"."""
        if isinstance(self.inputs, dict):
            return list(self.inputs.items())
        if len(self.inputs) == 1:
            return [("inputs", self.inputs[0])]
        return [(f"inputs[{i}]", tensor) for i, tensor in enumerate(self.inputs)]

    def __len__(self) -> int:
        return len(self.named_inputs()[0][1])

    def take(self, indices: Tensor | slice, name: str | None = None) -> ArrayData:
        """Return the examples at `indices` (int64 [M] or a slice; a slice copies nothing).

        Args:
            indices: which examples, in order.
            name: what to call them; the same name if not given.

        Returns:
            The chosen examples.

        Raises:
            BadData: no example is chosen.
        """
        targets = None if self.targets is None else self.targets[indices]
        name = name or self.name
        redraw = None if self.redraw is None else partial(_taken, self.redraw, indices, name)
        return replace(self, inputs=_index(self.inputs, indices), targets=targets, name=name, redraw=redraw)

    def first(self, count: int) -> ArrayData:
        """Return the first `count` examples, or all where there are fewer.

        Args:
            count: at least 1.

        Returns:
            A view of these examples.

        Raises:
            UsageError: count is below 1.
        """
        if count < 1:
            raise UsageError(f"{self.name}: the first {count} examples were asked for; ask for 1 or more")
        return self.take(slice(count))

    def sample(self, count: int, seed: int = 0) -> ArrayData:
        """Return `count` examples drawn at random without replacement, in random order; all where there are fewer.

        Folders and files often hold class after class, so that the first examples, and batches of neighbours, are no
        sample of the whole.

        Args:
            count: at least 1.
            seed: of the permutation whose head is taken.

        Returns:
            The chosen examples.

        Raises:
            UsageError: count is below 1.
        """
        if count < 1:
            raise UsageError(f"{self.name}: a sample of {count} examples was asked for; ask for 1 or more")
        return self.take(_permutation(len(self), seed)[:count])

    def batches(
        self, batch_size: int, seed: int | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield (inputs, targets) of consecutive batches.

        Args:
            batch_size: examples in a batch; the last one may be smaller.
            seed: shuffle with this seed; None keeps the order.
            drop_last: leave out a smaller last batch (unless it is the only one).

        Yields:
            Inputs in the structure of `inputs` and targets (None where there are none).

        Raises:
            UsageError: batch_size is below 1.
        """
        if batch_size < 1:
            raise UsageError(f"a batch of {batch_size} examples was asked for; ask for 1 or more")
        total = len(self)
        order = None if seed is None else _permutation(total, seed)
        stop = total - total % batch_size if drop_last and total >= batch_size else total
        for start in range(0, stop, batch_size):
            rows = slice(start, start + batch_size)
            chosen = rows if order is None else order[rows]
            yield _index(self.inputs, chosen), None if self.targets is None else self.targets[chosen]

    def split(self, fraction: float, seed: int = 0) -> tuple[ArrayData, ArrayData]:
        """Split at random into (training, validation), the same way for the same seed.

        Args:
            fraction: share of the examples for validation, above 0 and below 1; each side gets at least one.
            seed: of the permutation.

        Returns:
            The two parts, each in the original order; their names say the share and the seed.

        Raises:
            UsageError: fraction is not between 0 and 1, or a seed that is none.
            BadData: there are fewer than two examples.
        """
        if not 0.0 < fraction < 1.0:
            raise UsageError(f"the share of validation examples is {fraction:g}; take one between 0 and 1")
        check_seed(seed)
        total = len(self)
        if total < 2:
            raise BadData(f"{self.name}: one example cannot be split into training and validation; give more")
        held = min(max(round(fraction * total), 1), total - 1)
        order = _permutation(total, seed)
        parts = (("training", order[held:]), ("validation", order[:held]))
        training, validation = (
            self.take(rows.sort().values, f"{self.name} [{part} {len(rows)} of {total}, seed {seed}]")
            for part, rows in parts
        )
        return training, validation

    def describe(self) -> str:
        """Say in one line what is here: "digits: 1,797 examples, inputs float32[1,8,8], targets int64[]"."""
        arrays = self.named_inputs()
        if self.targets is not None:
            arrays.append(("targets", self.targets))
        told = ", ".join(f"{key} {kind(tensor)}[{shape(tensor.shape[1:])}]" for key, tensor in arrays)
        return f"{self.name}: {len(self):,} example{'s' * (len(self) != 1)}, {told}"


def kind(tensor: Tensor) -> str:
    """Name the type of the elements, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def shape(sizes: Iterable[object]) -> str:
    """Write sizes as "3,224,224"."""
    return ",".join(str(size) for size in sizes)


def _index(inputs: Inputs, rows: Tensor | slice) -> Inputs:
    if isinstance(inputs, dict):
        return {key: tensor[rows] for key, tensor in inputs.items()}
    return tuple(tensor[rows] for tensor in inputs)


def _taken(redraw: Redraw, indices: Tensor | slice, name: str, side: int) -> ArrayData:
    return redraw(side).take(indices, name)


def check_seed(seed: object) -> None:
    """Check that everything that is drawn can be drawn from a seed, and from its multiples.

    Raises:
        UsageError: it is no whole number from 0 to 2^40.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) <= MOST_SEED:
        raise UsageError(f"seed is a whole number from 0 to 2^40, got {seed!r}")


def _permutation(total: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))
