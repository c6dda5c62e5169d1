"""Checkpoints of a training run: all that the next epoch depends on, in one file that holds no code."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.distributed import Group
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadFile, UsageError
from kfe_fx.format.atomic import replacing
from kfe_fx.program import Program, named_tensors
from kfe_fx.training.loop import Record, Trainer, put_state

FORMAT, VERSION = "kfe-fx training checkpoint", 1
_DAMAGE = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError)


@dataclass(frozen=True)
class Identity:
    """What a run is: hashes of the network it starts from and of its data, and its settings."""

    model: str
    data: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, program: Program, data: Iterable[Any], **settings: Any) -> Identity:
        """Identify a run by its Program before any step, its data sets, and plain settings."""
        from kfe_fx.curvature.store import graph_hash, weights_hash

        model = f"{graph_hash(program)} {weights_hash(program)}"
        return cls(model, " ".join(data_hash(one) for one in data), settings)

    def check(self, path: Path, found: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            UsageError: it started from another network, saw other data, or had other settings.
        """
        if found["model"] != self.model:
            raise UsageError(f"{path}: the run in it started from another network; give the same, or start anew")
        for key in dict.fromkeys((*self.settings, *found["settings"])):
            mine, theirs = self.settings.get(key), found["settings"].get(key)
            if mine != theirs:
                raise UsageError(f"{path}: the run in it has {key} {theirs}, not {mine}; give the same, or start anew")
        if found["data"] != self.data:
            raise UsageError(f"{path}: the run in it was trained on other data; give the same, or start anew")


def data_hash(data: Any) -> str:
    """Hash a data set: every value of an ArrayData; of anything else only its kind and length."""
    digest = hashlib.sha256()
    if isinstance(data, ArrayData):
        for name, value in [*data.named_inputs(), *([] if data.targets is None else [("targets", data.targets)])]:
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        count = len(data) if hasattr(data, "__len__") else "?"
        digest.update(f"{type(data).__qualname__} {count}".encode())
    return digest.hexdigest()


def save_checkpoint(path: Path, identity: Identity, trainer: Trainer, threads: int) -> None:
    """Write where a run is, between two epochs; rank 0 writes for all, and every rank must call this.

    Raises:
        BadFile: the file cannot be written.
    """
    record, group = trainer.record, trainer.group
    random = group.gather(_random_state(trainer))
    if group.rank:
        return
    document = {
        "format": FORMAT,
        "version": VERSION,
        "run": {"model": identity.model, "data": identity.data, "settings": identity.settings},
        "tensors": {name: value.detach() for name, value in named_tensors(trainer.program.module()).items()},
        "optimizer": trainer.optimizer.state_dict(),
        "random": random,
        "threads": threads,
        "reduction": trainer.loss.reduction,
        "record": {
            "epochs": record.epochs,
            "losses": torch.tensor(record.losses, dtype=torch.float64),
            "epoch_losses": record.epoch_losses,
            "judged": record.judged,
            "best": record.best,
            "kept": record.kept,
        },
    }
    with replacing(path) as handle:
        torch.save(document, handle)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        BadFile: there is none, it is damaged, or it is something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch makes of foreign files is said below
            document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadFile(f"{path}: there is no checkpoint to go on from") from None
    except (OSError, EOFError, pickle.UnpicklingError, *_DAMAGE) as error:
        raise BadFile(f"{path}: this is no checkpoint, or it is damaged ({type(error).__name__})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadFile(f"{path}: this is no checkpoint of a training run")
    if document.get("version") != VERSION:
        raise BadFile(f"{path}: a checkpoint of version {document.get('version')}, this kfe-fx reads {VERSION}")
    return document


def restore(path: Path, document: dict[str, Any], identity: Identity, trainer: Trainer) -> None:
    """Bring a run to where its checkpoint was: tensors, optimiser, random numbers and record.

    Raises:
        UsageError: it is the checkpoint of another run.
        BadFile: it is damaged.
    """
    try:
        identity.check(path, document["run"])
        put_state(trainer.program, document["tensors"])
        trainer.optimizer.load_state_dict(document["optimizer"])
        held = document["record"]
        trainer.record = Record(
            int(held["epochs"]),
            held["losses"].tolist(),
            list(held["epoch_losses"]),
            list(held["judged"]),
            held["best"],
            held["kept"],
        )
        if document["reduction"]:
            trainer.loss = replace(trainer.loss, reduction=document["reduction"])
        _set_random_state(document["random"][trainer.group.rank])
    except _DAMAGE as error:
        raise BadFile(f"{path}: the checkpoint is damaged ({type(error).__name__})") from error


def cuda_devices(program: Program) -> list[int]:
    """Return the CUDA devices that a Program's parameters are on."""
    found = {value.device for value in program.module().parameters() if value.device.type == "cuda"}
    return sorted(device.index or 0 for device in found)


def seed_random(seed: int, group: Group) -> None:
    """Seed random numbers; each rank draws its own (dropout), rank 0 what one process would."""
    torch.manual_seed(seed + 1_000_003 * group.rank)


def _random_state(trainer: Trainer) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {str(index): torch.cuda.get_rng_state(index) for index in cuda_devices(trainer.program)}


def _set_random_state(states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, int(name))
