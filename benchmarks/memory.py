"""Peak memory of pruning, in multiples of the model plus its activations.

    python benchmarks/memory.py

Prunes ResNet-50 and ViT-B/16 (random weights, 224x224) to half of their multiply-accumulates in a process of their own
each. ``model`` is the bytes of parameters and buffers, ``activations`` the exact peak at the batch size of the proof
(3); ``peak`` is the largest resident set, less what the process held when the libraries were loaded.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from analysis import ViT, resnet50

import kfe_fx

BATCH = 3
NETWORKS = {"ResNet-50": resnet50, "ViT-B/16": ViT}


def measure(name: str) -> None:
    """Prune one network in this process and print its line."""
    torch.set_num_threads(1)
    kfe_fx.capture(torch.nn.Linear(4, 4), torch.randn(1, 4))  # loads what capturing needs
    before = _peak()
    module = NETWORKS[name]().eval()
    model = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    result = kfe_fx.prune(module, torch.randn(1, 3, 224, 224), budget=0.5, metric="macs", criterion="magnitude")
    peak = _peak() - before
    activations = BATCH * result.certificate.before["peak_memory"]
    ratio = peak / (model + activations)
    print(
        f"{name}: model {model / 2**20:.0f} MiB, activations {activations / 2**20:.0f} MiB, "
        f"peak {peak / 2**20:.0f} MiB, {ratio:.1f} times their sum"
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for each in NETWORKS:
            subprocess.run([sys.executable, __file__, each], check=True)
