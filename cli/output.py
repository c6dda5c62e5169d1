"""What is shown: tables on a terminal, JSON for a program, progress on stderr while it lasts."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

WIDTH = 110  # of a table that goes into a file or a pipe

Report = Callable[..., None]


def plain(value: Any) -> Any:
    """Turn a value into what strict JSON can hold: no NaN, no tuples, no objects of ours."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return plain(value.tolist())
    return str(value)


def show_json(value: Any) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def show_table(
    rows: Iterable[Sequence[Any]], columns: Sequence[str], *, title: str = "", numbers: Sequence[int] = ()
) -> None:
    """Print rows as a table, coloured on a terminal; the columns `numbers` are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        right = index in numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(table)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Report | None]:
    """Give a function `report(stage, done=None)` that keeps one line on stderr, or None where nobody watches.

    `done` runs from 0 to 1 within a stage; without it the line only shows that work goes on.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(stage: str, done: float | None = None) -> None:
            bar.update(task, description=stage, total=None if done is None else 1.0, completed=done or 0.0)

        yield report


def short(path: Path) -> str:
    """Give the shorter of a path and the same seen from the current folder."""
    seen = os.path.relpath(path)
    return min(str(path), seen, key=len)
