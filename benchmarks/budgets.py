"""Requested against freshly measured latency on the three reference networks, without training.

    python benchmarks/budgets.py [0.7 0.5 0.35]

Each row is one pruning run from the network's own calibration sample, and the final measurement that the certificate
holds: dense and pruned models interleaved in one process. ``yield`` is the measured speed-up over that of the
multiply-accumulates.
"""

from __future__ import annotations

import sys
from importlib import resources

import torch

import kfe_fx

NETWORKS = ("glyphs_resnet", "glyphs_mobilenet", "glyphs_vit")


def main(budgets: list[float]) -> None:
    """Print a line per network and budget."""
    torch.set_num_threads(1)
    print("network            asked  measured (95 %)         turns  MACs   yield")
    for name in NETWORKS:
        with resources.as_file(resources.files("kfe_fx.models") / f"{name}.pt") as path:
            program = kfe_fx.load(path)
        for budget in budgets:
            certificate = kfe_fx.prune(program, budget=budget).certificate
            measured = certificate.measured["latency"]
            low, high = measured["interval"]
            macs = certificate.after["macs"] / certificate.before["macs"]
            print(
                f"{name:18s} {budget:5.2f}  {measured['ratio']:.3f} ({low:.3f}-{high:.3f})  "
                f"{len(certificate.measured['turns']):5d}  {macs:.3f}  {macs / measured['ratio']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main([float(text) for text in sys.argv[1:]] or [0.7, 0.5, 0.35])
