"""Tell what a file is from its content, reading only its two ends."""

from __future__ import annotations

import re
import zipfile
from typing import BinaryIO

from kfe_fx.format import layout
from kfe_fx.format.archive import MAGIC, Archive
from kfe_fx.format.fields import Malformed

_HEAD = 4096

# What this loader reads
PROGRAM, CHECKPOINT, LEGACY, EXPORTED, SAFETENSORS = "program", "checkpoint", "legacy", "exported", "safetensors"

_EXPORT_AGAIN = "load it in PyTorch and write the module with kfe_fx.save"
_TORCHSCRIPT = "this is a TorchScript archive; load its state dict into the nn.Module and write that with kfe_fx.save"
_FOREIGN = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras weights?)"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"BZh", "bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"Rar!", "a RAR archive"),
    (b"\x93NUMPY", "a NumPy array; a network is expected, data goes to --data"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run 'git lfs pull'"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a compiled program"),
)


def sniff(handle: BinaryIO) -> tuple[str, str]:
    """Return ``(kind, "")`` for a file that can be read, else ``("", what it looks like and what to do)``."""
    handle.seek(0)
    head = handle.read(_HEAD)
    if not head:
        return "", "the file is empty"
    if head.startswith(MAGIC):
        return _sniff_zip(handle)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            return "", f"this is {what}"
    if re.match(rb"\x80[\x02-\x05]", head):
        return LEGACY, ""
    size = handle.seek(0, 2)
    if len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS, ""
    if head[:1] == b"\x08" and head[1] < 32 and re.match(rb"\x08.[\x12\x1a\x22\x2a\x32\x3a\x42]", head, re.DOTALL):
        return "", f"this looks like an ONNX model; kfe-fx reads PyTorch networks: {_EXPORT_AGAIN}"
    if head[257:262] == b"ustar":
        return "", "this is a tar archive; unpack it first"
    if not head.strip(b"\0"):
        return "", "the file begins with zeros: this is no model, or its download was cut off"
    return "", f"this is no model file that kfe-fx knows{_text_hint(head)}; give a program file or a PyTorch checkpoint"


def _text_hint(head: bytes) -> str:
    try:
        text = head[:200].decode("ascii")
    except UnicodeDecodeError:
        return ""
    if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
        return " but a web page (a failed download?)"
    return " but text" if text.isprintable() or "\n" in text else ""


def _sniff_zip(handle: BinaryIO) -> tuple[str, str]:
    try:
        archive = Archive(handle)
    except Malformed as error:
        return "", _foreign_zip(handle) or f"{error}; get the file again"
    names = archive.members
    if layout.GRAPH in names:
        return PROGRAM, ""
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return EXPORTED, ""
    if "constants.pkl" in names:
        return "", _TORCHSCRIPT
    if "data.pkl" in names:
        return CHECKPOINT, ""
    return "", _foreign_zip(handle) or "this is a zip, but not one that torch.save wrote"


def _foreign_zip(handle: BinaryIO) -> str:
    # only after the checks of Archive have failed, and only names: what the user probably gave by mistake
    try:
        with zipfile.ZipFile(handle) as opened:
            names = opened.namelist()[:1000]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError):
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return "this is a NumPy .npz; a network is expected, data goes to --data"
    if any(name.endswith("/constants.pkl") for name in names):
        return _TORCHSCRIPT
    if "config.json" in names and any(name.endswith(".h5") for name in names):
        return "this is a Keras model; kfe-fx reads PyTorch networks"
    return ""
