"""Every error kfe-fx raises on purpose, as one tree.

Each error carries ONE line of text: what is wrong, where, and what to do next. The command line turns a class
into its exit code; nothing else does.
"""

from __future__ import annotations

from typing import ClassVar


class KfeError(Exception):
    """Say what kfe-fx cannot do with what it was given; the root of the tree."""

    exit_code: ClassVar[int] = 1


class UsageError(KfeError):
    """Say that an argument or option has a value that means nothing."""

    exit_code: ClassVar[int] = 2


class BadFile(KfeError):
    """Say that a file is missing, damaged, foreign, hostile or in the way."""

    exit_code: ClassVar[int] = 2


class PlanError(UsageError):
    """Say that a plan does not fit the program it is applied to."""


class UnsupportedModel(KfeError):
    """Say that a network cannot be captured or rewritten; nothing was changed."""

    exit_code: ClassVar[int] = 3


class InfeasibleBudget(KfeError):
    """Say that no plan meets the budget; the text names the nearest one that exists."""

    exit_code: ClassVar[int] = 4


class VerificationFailed(KfeError):
    """Say that an output does not compute what its source computes."""

    exit_code: ClassVar[int] = 5


class BadData(KfeError):
    """Say that a data set has the wrong shape, type or values."""

    exit_code: ClassVar[int] = 6


class MissingDependency(KfeError):
    """Say which package must be installed for what was asked."""

    exit_code: ClassVar[int] = 7
