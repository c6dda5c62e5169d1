"""The program file: a torch checkpoint of the state dict that carries its graph; docs/program-file.md specifies it."""

from kfe_fx.format.reader import load
from kfe_fx.format.writer import save

__all__ = ["load", "save"]
