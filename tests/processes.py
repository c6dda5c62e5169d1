"""Run a function in two processes that talk by gloo, and get what each returns."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from kfe_fx.curvature.distributed import joined

SIZE = 2


def in_two_processes(function: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Return what ``function(folder)``, a module's own, returns on rank 0 and on rank 1."""
    mp.spawn(_work, (function, str(folder)), SIZE)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def torchrun(*args: object) -> str:
    """Run ``kfe-fx`` in two processes, as torchrun starts them, in the current folder; return what they print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
    done = subprocess.run(
        [*launch, "-m", "kfe_fx.cli.main", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _work(rank: int, function: Callable[[Path], Any], folder: str) -> None:
    faulthandler.enable()  # what aborts says where
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name service needed
    place = Path(folder)
    with joined(init_method=f"file://{place / 'store'}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=120)):
        torch.save(function(place), place / f"{rank}.pt")
