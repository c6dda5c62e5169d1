"""What a pass is: a frozen dataclass whose fields are its options, from Program to Program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kfe_fx.program import Program


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the Program after it, whether anything changed, and facts for the report."""

    program: Program
    modified: bool
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A pass over Programs.

    ``name`` is kebab-case. ``keeps`` says what becomes of the function: "exact" (the same), "trained" (another one, to
    be trained or verified), "observes" (nothing but reading). A run that does better says so as ``keeps`` in its facts.
    """

    name: ClassVar[str]
    keeps: ClassVar[str]

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Apply the pass; the given Program is never touched."""
