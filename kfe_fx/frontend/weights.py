"""State dicts: read without running code, found in their wrappings, matched to a module."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from kfe_fx.errors import BadFile
from kfe_fx.format.archive import MAGIC, Archive
from kfe_fx.format.fields import Malformed

StateDict = Mapping[str, torch.Tensor]
_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|Unsupported class|class) ([\w.]+)")
# added by wrappers: DataParallel and DDP, torch.compile, Lightning
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


class HoldsCode(Exception):
    """Say which class or function a pickle would import."""


def read_pickle(path: Path, handle: BinaryIO) -> Any:
    """Return the content of a torch checkpoint that holds nothing but plain data and tensors.

    Raises:
        HoldsCode: it would import something else; only a trusted file may.
        BadFile: damaged.
    """
    check_zip(path, handle)
    handle.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the legacy formats
            return torch.load(handle, map_location="cpu", weights_only=True)
    except MemoryError:
        raise BadFile(f"{path}: larger than the memory of this machine") from None
    except Exception as error:  # unpickling damaged or hostile bytes raises anything
        found = _GLOBAL.search(str(error))
        if found:
            raise HoldsCode(found[1]) from None
        reason = _reason(error)
        raise BadFile(
            f"{path}: not a readable PyTorch checkpoint ({reason}): damaged or truncated; get the file again"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("WeightsUnpickler error")]
    return (told or lines or [type(error).__name__])[0].removeprefix("WeightsUnpickler error: ")[:160]


def check_zip(path: Path, handle: BinaryIO) -> None:
    """Check sizes and checksums of a checkpoint's zip before torch reads it; other files pass.

    Raises:
        BadFile: damaged, or packed to be larger than it looks.
    """
    handle.seek(0)
    if handle.read(len(MAGIC)) != MAGIC:
        return
    try:
        archive = Archive(handle)
        for name in archive.members:
            archive.check(name)
    except Malformed as error:
        raise BadFile(f"{path}: {error}; get the file again") from error


def read_safetensors(path: Path) -> StateDict:
    """Return the tensors of a safetensors file.

    Raises:
        BadFile: damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise BadFile(f"{path}: not a readable safetensors file ({_reason(error)}); get the file again") from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(part, torch.Tensor) for key, part in value.items() if not key.endswith("_extra_state"))
    )


def candidates(content: Any) -> dict[str, StateDict]:
    """Return the state dicts in a checkpoint by the key they stand under ("" for the whole)."""
    if _is_state_dict(content):
        return {"": content}
    if not isinstance(content, Mapping):
        return {}
    return {str(key): value for key, value in content.items() if _is_state_dict(value)}


def load_weights(path: Path, content: Any, module: nn.Module, arch: str) -> None:
    """Load the state dict in ``content`` into ``module``; wrappings are undone where only one reading fits.

    Raises:
        BadFile: none fits (with the first key and counts), or several do.
    """
    found = candidates(content)
    if not found:
        kind = type(content).__name__
        raise BadFile(f"{path}: holds no state dict but a {kind}; save module.state_dict(), or use kfe_fx.save")
    expected = module.state_dict()
    fitting = {
        key: state for key, state in ((key, _fit(state, expected)) for key, state in found.items()) if state is not None
    }
    if len(fitting) > 1:
        keys = ", ".join(repr(key) for key in fitting)
        raise BadFile(
            f"{path}: holds several state dicts that fit {arch}: {keys}; save the one that is meant by itself"
        )
    if not fitting:
        raise BadFile(f"{path}: does not fit {arch}: {_mismatch(max(found.values(), key=len), expected)}")
    state = next(iter(fitting.values()))
    for key, value in state.items():
        if key in expected and isinstance(value, torch.Tensor):
            _check_tensor(path, arch, key, value, expected[key])
    module.load_state_dict(dict(state), strict=False)


def _check_tensor(path: Path, arch: str, key: str, value: torch.Tensor, expected: Any) -> None:
    if value.is_meta or value.layout is not torch.strided or value.is_quantized:
        raise BadFile(f"{path}: {key} is not an ordinary tensor ({value.dtype}, {value.layout}); convert it first")
    if isinstance(expected, torch.Tensor) and value.shape != expected.shape:
        shapes = f"{list(value.shape)}, there it is {list(expected.shape)}"
        raise BadFile(
            f"{path}: does not fit {arch}: {key} has the shape {shapes}; was the network built with other options?"
        )


def _fit(state: StateDict, expected: Mapping[str, Any]) -> StateDict | None:
    """Return ``state`` with the keys of the module, or None."""
    while state:
        if _same_keys(state, expected):
            return state
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            return None
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return None


def _same_keys(state: StateDict, expected: Mapping[str, Any]) -> bool:
    missing, unexpected = _difference(state, expected)
    return not missing and not unexpected


def _difference(state: StateDict, expected: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    # num_batches_tracked is younger than many checkpoints and does not change what the network computes
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    return missing, [key for key in state if key not in expected]


def _mismatch(state: StateDict, expected: Mapping[str, Any]) -> str:
    missing, unexpected = _difference(state, expected)
    parts = [
        f"{len(keys)} keys are {what} (first {keys[0]!r})" if len(keys) > 1 else f"the key {keys[0]!r} is {what}"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    return " and ".join(parts)
