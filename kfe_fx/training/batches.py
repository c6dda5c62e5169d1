"""One view of all data: an ArrayData, a torch Dataset or DataLoader, a pair of arrays, or any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kfe_fx.data.dataset import ArrayData
from kfe_fx.data.npz import TARGETS
from kfe_fx.errors import BadData
from kfe_fx.labels.states import narrow_input, widths
from kfe_fx.program import Program
from kfe_fx.structure import pack


@dataclass(frozen=True)
class Batch:
    """A few examples: ``inputs`` flat in the order of the graph, ``targets`` [N, ...] or None, ``count`` N.

    ``dims`` says per input which dim counts the examples, None where none does.
    """

    inputs: list[Any]
    targets: Tensor | None
    count: int
    dims: tuple[int | None, ...] = ()

    def rows(self, start: int, stop: int) -> Batch:
        """Take some of the examples; what does not count examples stays whole."""
        stop = min(stop, self.count)

        def cut(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor) or dim is None or value.dim() <= dim or value.shape[dim] != self.count:
                return value
            return value.narrow(dim, start, stop - start)

        dims = self.dims or (0,) * len(self.inputs)
        inputs = [cut(value, dim) for value, dim in zip(self.inputs, dims, strict=True)]
        return Batch(inputs, cut(self.targets, 0), stop - start, self.dims)


class Batches:
    """Iterate over the batches of any data, again and again.

    Floating-point inputs take the type of the Program's example inputs. Batches and whole arrays are as the network
    takes them, also where another dim than the first counts the examples; an ArrayData or Dataset has examples first.
    """

    def __init__(self, program: Program, data: Any, batch_size: int = 64) -> None:
        """Look at what ``data`` is; one-shot iterators are read into memory.

        Raises:
            BadData: it is nothing that holds examples.
        """
        self.program = program
        self.batch_size = pinned_batch(program) or batch_size
        self._types = [value.dtype if isinstance(value, Tensor) else None for value in program.flat_examples()]
        dims = program.example_dims() or dict.fromkeys(program.signature.input_names, 0)
        self._dims = tuple(dims.get(name) for name in program.signature.input_names)
        if isinstance(data, Batches):
            data = data.data
        if isinstance(data, ArrayData | Dataset | DataLoader):
            self.data: Any = data
        elif isinstance(data, Mapping) or _is_whole(data):
            self.data = self._whole(data)
        elif isinstance(data, Iterator):
            self.data = list(data)
        elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
            self.data = data
        else:
            raise BadData(
                f"data is a {type(data).__name__}: give (inputs, targets), a Dataset, a DataLoader or batches"
            )

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch in order."""
        return self.epoch(None)

    def __len__(self) -> int:
        """Count the batches of an epoch; 0 where the data does not know."""
        if isinstance(self.data, ArrayData):
            return -(-len(self.data) // self.batch_size)
        if isinstance(self.data, Dataset):
            return -(-len(self.data) // self.batch_size)  # type: ignore[arg-type]
        return len(self.data) if hasattr(self.data, "__len__") else 0

    def steps(self) -> int:
        """Count the batches of an epoch that drops a smaller last batch, by reading where the data does not know."""
        if isinstance(self.data, ArrayData | Dataset):
            return max(1, self.examples() // self.batch_size)
        return len(self) or sum(1 for _ in self)

    def examples(self) -> int:
        """Count the examples, by reading where the data does not know."""
        if isinstance(self.data, ArrayData | Dataset):
            return len(self.data)  # type: ignore[arg-type]
        return sum(batch.count for batch in self)

    def epoch(self, seed: int | None, *, drop_last: bool = False) -> Iterator[Batch]:
        """Yield every batch, shuffled by ``seed`` where the data can be shuffled.

        ``drop_last`` leaves out a smaller last batch, unless it is the only one; where batches come ready-made, only
        one of a single example after larger ones, of which a norm cannot take the variance.
        """
        largest = 0
        for item in self._raw(seed, drop_last):
            batch = self._batch(item)
            largest = max(largest, batch.count)
            if drop_last and batch.count == 1 < largest:
                continue
            if pinned_batch(self.program) not in (None, batch.count):
                continue  # a network that pins its batch takes nothing else
            yield batch

    def _raw(self, seed: int | None, drop_last: bool) -> Iterable[Any]:
        if isinstance(self.data, ArrayData):
            return self.data.batches(self.batch_size, seed, drop_last)
        if isinstance(self.data, Dataset):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            only = len(self.data) < self.batch_size  # type: ignore[arg-type]
            drop = drop_last and not only
            return DataLoader(self.data, self.batch_size, seed is not None, generator=generator, drop_last=drop)
        return self.data

    def _batch(self, item: Any) -> Batch:
        inputs, targets = split_batch(item)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        flat = self.program.signature.flatten(args, kwargs)
        if isinstance(self.data, ArrayData | Dataset):  # examples first
            flat = [value.movedim(0, dim) if dim else value for value, dim in zip(flat, self._dims, strict=True)]
        cast = [
            value.to(wanted) if wanted is not None and wanted.is_floating_point and value.is_floating_point() else value
            for value, wanted in zip(flat, self._types, strict=True)
        ]
        if widths(self.program):  # examples for the original feed what was cut from it
            names = self.program.signature.input_names
            cast = [narrow_input(self.program, name, value) for name, value in zip(names, cast, strict=True)]
        counts = (
            value.shape[dim]
            for value, dim in zip(cast, self._dims, strict=True)
            if isinstance(value, Tensor) and dim is not None and value.dim() > dim
        )
        return Batch(cast, targets, next(counts, 1), self._dims)

    def _whole(self, data: Any) -> ArrayData:
        inputs, targets = split_batch(data)
        if any(self._dims):
            dims = dict(zip(self.program.signature.input_names, self._dims, strict=True))
            if isinstance(inputs, dict):
                inputs = {name: value.movedim(dims.get(name) or 0, 0) for name, value in inputs.items()}
            else:
                inputs = tuple(value.movedim(dim or 0, 0) for value, dim in zip(inputs, self._dims, strict=True))
        return ArrayData(inputs, targets)

    def targets(self) -> Tensor | None:
        """Return the targets of the first batch, or None where the data has none.

        Raises:
            BadData: there are no batches.
        """
        for batch in self:
            return batch.targets
        raise BadData("the data yields no batches; an iterator that was used up before yields nothing")

    def labels(self) -> Iterator[Tensor | None]:
        """Yield the targets of all examples, in parts."""
        if isinstance(self.data, ArrayData):
            yield self.data.targets
        else:
            yield from (batch.targets for batch in self)


class Loader:
    """What functions of the user's get: iterate (inputs, targets).

    A single input comes as it is (``module(inputs)``), several as a tuple (``module(*inputs)``), or as a dict where the
    network takes keywords (``module(**inputs)``).
    """

    def __init__(self, batches: Batches) -> None:
        """Wrap batches."""
        self.batches = batches

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield (inputs, targets)."""
        signature = self.batches.program.signature
        for batch in self.batches:
            args, kwargs = pack(signature.inputs, batch.inputs)
            if kwargs:
                yield dict(zip(signature.arg_names, args, strict=False)) | kwargs, batch.targets
            elif len(args) == 1 and isinstance(args[0], Tensor):
                yield args[0], batch.targets
            else:
                yield args, batch.targets


def call(module: nn.Module, inputs: Any) -> Any:
    """Call a module on what a ``Loader`` yields."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def pinned_batch(program: Program) -> int | None:
    """Return the batch size that the network pins, or None where it is dynamic."""
    if program.batch_axes():
        return None
    return next((len(value) for value in program.flat_examples() if isinstance(value, Tensor) and value.dim()), None)


def split_batch(item: Any) -> tuple[tuple[Any, ...] | dict[str, Any], Tensor | None]:
    """Split a batch into inputs (positional or by name) and targets.

    Raises:
        BadData: the batch is of another form.
    """
    if isinstance(item, Mapping):
        targets = [key for key in item if key in TARGETS]
        named = {str(key): _tensor(value) for key, value in item.items() if key not in TARGETS}
        return named, _tensor(item[targets[0]]) if targets else None
    if isinstance(item, Tensor | np.ndarray):
        return (_tensor(item),), None
    if not isinstance(item, tuple | list) or not 1 <= len(item) <= 2:
        raise BadData(f"a batch is a {type(item).__name__}: yield (inputs, targets) or a dict of arrays")
    inputs = item[0]
    targets = None if len(item) == 1 or item[1] is None else _tensor(item[1])
    if isinstance(inputs, Mapping):
        return {str(key): _tensor(value) for key, value in inputs.items()}, targets
    return tuple(_tensor(value) for value in inputs) if isinstance(inputs, tuple | list) else (
        _tensor(inputs),
    ), targets


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _is_whole(data: Any) -> bool:
    """Tell (inputs, targets) of whole arrays from a pair of batches."""
    if isinstance(data, Tensor | np.ndarray):
        return True
    return isinstance(data, tuple) and len(data) == 2 and (data[1] is None or isinstance(data[1], Tensor | np.ndarray))
