"""Train the reference networks and write them as program files.

    python -m kfe_fx.models.train resnet       # train, measure, write models/glyphs_resnet.pt
    python -m kfe_fx.models.train all --states DIR --from-state    # write again from DIR/NAME.pt

Every epoch draws fresh examples (stream seeds 1, 2, 3, ...; the calibration sample has a seed of its own, and
accuracy is measured on the held-out stream): glyphs that are never seen twice, or windows that start elsewhere in the
same text. AdamW, learning rate up and down one cycle (Smith and Topin 2018). One thread and fixed seeds: the same
torch on the same processor gives the same file.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.errors import BadFile
from kfe_fx.models.tasks import CHARS, GLYPHS, SMALL_GLYPHS, TAGS, Task

EXAMPLES = 20_000  # an epoch
FIRST_SEED = 1  # of the training stream; 0 is left to those who fine-tune
CALIBRATION_SEED = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        epochs: passes over `EXAMPLES` fresh examples.
        rate: highest learning rate of the cycle.
        decay: AdamW's weight decay.
        batch: examples a step.
        half: run convolutions and matrix products in bfloat16 (weights stay float32), where the processor has AVX-512.
        clip: largest norm of the gradient.
        task: what it is trained on.
        calibration: examples kept in the program file.
    """

    epochs: int
    rate: float
    decay: float = 0.05
    batch: int = 128
    half: bool = False
    clip: float = 5.0
    task: Task = GLYPHS
    calibration: int = 512


RECIPES = {
    "resnet": Recipe(epochs=6, rate=4e-3, half=True),
    "mobilenet": Recipe(epochs=4, rate=3e-3, batch=64, half=True),
    "vit": Recipe(epochs=6, rate=1.2e-3, batch=64, clip=1.0),
    "rows": Recipe(epochs=40, rate=3e-3, batch=64, half=True, clip=1.0, task=SMALL_GLYPHS, calibration=384),
    "tagger": Recipe(epochs=10, rate=4e-3, decay=0.01, batch=32, clip=1.0, task=TAGS),
    "chars": Recipe(epochs=15, rate=4e-3, decay=0.01, batch=32, half=True, clip=1.0, task=CHARS),
}
FILES = {
    "resnet": "glyphs_resnet",
    "mobilenet": "glyphs_mobilenet",
    "vit": "glyphs_vit",
    "rows": "glyph_rows",
    "tagger": "source_tagger",
    "chars": "char_lstm",
}  # without .py and .pt


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build the network `name` and its example input, one image or window of characters."""
    return importlib.import_module(f"kfe_fx.models.{FILES[name]}").factory()


def train(name: str, recipe: Recipe, tell: Callable[[str], None]) -> nn.Module:
    """Train the network `name` from scratch.

    Args:
        name: a key of `RECIPES`.
        recipe: how to train it.
        tell: receives one line per epoch.

    Returns:
        The trained network in evaluation mode.
    """
    torch.manual_seed(0)
    net, _ = build(name)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = recipe.epochs * (EXAMPLES // recipe.batch)
    half = recipe.half and torch.backends.cpu.get_cpu_capability() == "AVX512"  # others have no LSTM in bfloat16
    optimizer = torch.optim.AdamW(_decayed(net, recipe.decay), lr=recipe.rate, betas=(0.9, 0.98))
    cycle = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cycle(step / steps))
    began = time.monotonic()
    for epoch in range(recipe.epochs):
        net.train()
        inputs, targets = recipe.task.draw(EXAMPLES, FIRST_SEED + epoch)
        total = 0.0
        for start in range(0, EXAMPLES - recipe.batch + 1, recipe.batch):
            x = inputs[start : start + recipe.batch]
            if x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = net(x)
            loss = _cross_entropy(logits.float(), targets[start : start + recipe.batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
            optimizer.step()
            cycle.step()
            total += loss.item()
        mean = total / (EXAMPLES // recipe.batch)
        seen = f"{name} epoch {epoch + 1}/{recipe.epochs} loss {mean:.4f}"
        tell(f"{seen} held-out 2,000: {_shown(measure(net, recipe.task, 2000))} {time.monotonic() - began:.0f} s")
    return net.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _decayed(net: nn.Module, decay: float) -> list[dict[str, object]]:
    """Split the parameters: matrices and filters decay, vectors (biases, normalisations, gains) do not."""
    matrices = [p for p in net.parameters() if p.squeeze().ndim > 1]
    vectors = [p for p in net.parameters() if p.squeeze().ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _cycle(t: float) -> float:
    """Rise linearly over the first fifth of training, then fall by a cosine to zero."""
    return t / 0.2 if t < 0.2 else 0.5 * (1.0 + math.cos(math.pi * (t - 0.2) / 0.8))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Take the mean cross-entropy of logits [N, ..., C] and classes [N, ...]."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def measure(net: nn.Module, task: Task, count: int | None = None) -> dict[str, float]:
    """Measure `net` on the first `count` held-out examples of `task` (as many as it says unless told).

    Returns:
        "accuracy", the share of targets that are the class of the largest logit, 0 to 1; and of a text
        "bits", the mean cross-entropy per character in bits.
    """
    net.eval()
    inputs, targets = task.held_out(count or task.measured)
    right, nats = 0, 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(500), targets.split(500), strict=True):
            logits = net(x)  # [N, ..., C]
            right += int((logits.argmax(-1) == y).sum())
            nats += float(_cross_entropy(logits, y)) * y.numel()
    found = {"accuracy": right / targets.numel()}
    return found | {"bits": nats / targets.numel() / math.log(2)} if task.bits else found


def _shown(measured: dict[str, float]) -> str:
    told = f"{100 * measured['accuracy']:.2f} %"
    return f"{told}, {measured['bits']:.4f} bits per character" if "bits" in measured else told


def load(name: str, path: Path) -> nn.Module:
    """Build the network `name` with the state dict of `path`, in evaluation mode.

    Raises:
        BadFile: there is no such file.
    """
    if not path.is_file():
        raise BadFile(f"{path}: no such state dict; train first: python -m kfe_fx.models.train {name}")
    net, _ = build(name)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def write(name: str, net: nn.Module, out: Path) -> dict[str, object]:
    """Write `net` as a program file with its calibration sample, and its accuracy into accuracy.json.

    Args:
        name: a key of `RECIPES`.
        net: the trained network.
        out: the folder written to.

    Returns:
        What was recorded about this network.
    """
    import kfe_fx

    path, recipe = out / f"{FILES[name]}.pt", RECIPES[name]
    calibration = recipe.task.draw(recipe.calibration, CALIBRATION_SEED)
    kfe_fx.save(net, build(name)[1], path=path, calibration=calibration)
    record: dict[str, object] = {
        **{key: round(value, 4) for key, value in measure(net, recipe.task).items()},
        "held_out": recipe.task.measured,
        "parameters": sum(p.numel() for p in net.parameters()),
        "bytes": path.stat().st_size,
        "command": f"python -m kfe_fx.models.train {name}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    table = out / "accuracy.json"
    known = json.loads(table.read_text()) if table.is_file() else {}
    table.write_text(json.dumps(known | {name: record}, indent=2, sort_keys=True) + "\n")
    return record


@click.command()
@click.argument("name", type=click.Choice([*RECIPES, "all"]))
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs of 20,000 fresh examples (default: the recipe's).")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("models"), show_default=True)
@click.option("--states", type=click.Path(file_okay=False, path_type=Path), help="Folder of state dicts NAME.pt.")
@click.option("--from-state", is_flag=True, help="Do not train: read the state dicts of --states.")
@click.option("--no-write", is_flag=True, help="Stop after training and measuring.")
def main(name: str, epochs: int | None, out: Path, states: Path | None, from_state: bool, no_write: bool) -> None:
    """Train the reference network NAME, measure it on held-out examples and write its program file."""
    if from_state and states is None:
        raise click.UsageError("--from-state needs --states DIR, the folder that holds NAME.pt")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for each in RECIPES if name == "all" else (name,):
        if from_state and states is not None:
            net = load(each, states / f"{each}.pt")
        else:
            recipe = RECIPES[each]
            if epochs is not None:
                recipe = replace(recipe, epochs=epochs)
            net = train(each, recipe, click.echo)
            if states is not None:
                states.mkdir(parents=True, exist_ok=True)
                torch.save(net.state_dict(), states / f"{each}.pt")
        if no_write:
            task = RECIPES[each].task
            click.echo(f"{each} held-out {task.measured:,} {task.example}: {_shown(measure(net, task))}")
        else:
            click.echo(f"{each} {write(each, net, out)}")


if __name__ == "__main__":
    main()
