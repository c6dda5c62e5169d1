"""Run a function in two processes that talk by gloo, and get what each returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2


def in_two_processes(function: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Return what ``function(folder)``, a module's own, returns on rank 0 and on rank 1."""
    mp.spawn(_work, (function, str(folder)), SIZE)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def _work(rank: int, function: Callable[[Path], Any], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name service needed
    place = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(function(place), place / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
