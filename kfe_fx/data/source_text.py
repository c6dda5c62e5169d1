"""Python source to model or to tag: windows of text from the standard library that runs this program.

Nothing is downloaded. The files are those of `sysconfig.get_path("stdlib")` but for tests, tables, and the packages
that some distributions ship apart. A file is held out or trained on as a hash of its relative path says, so a file
that is held out is so in every release of Python. The text is that of the installed release: one release gives the
same windows everywhere, another one others.

Windows start anywhere in the text. Their starts are drawn from `numpy.random.SeedSequence((TAG, stream, seed))`, so
the same seed always gives the same windows and a longer set begins with the shorter one.
"""

from __future__ import annotations

import functools
import hashlib
import io
import keyword
import os
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfe_fx.errors import BadData, MissingDependency

OTHER = "other"  # what is not printable ASCII, a line feed or a tab
VOCABULARY = (OTHER, "\n", "\t", *(chr(code) for code in range(32, 127)))  # 98 classes
TAGS = ("space", "keyword", "name", "definition", "number", "string", "comment", "operator")
LENGTH = 100  # characters in a window unless told; not the size of the vocabulary, so that no axis is mistaken
TAG = 0x74657874  # keeps these streams apart from any other use of the same small seeds
TRAIN, HELD_OUT = 0, 1
SHARE = 10  # one file in so many is held out
LEFT_OUT = frozenset(
    [
        *("site-packages", "dist-packages", "__pycache__"),  # not the library
        *("test", "tests", "idle_test"),  # half of all text, much of it data
        *("encodings", "pydoc_data"),  # tables and one long text
        # what some distributions ship apart
        *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo"),
    ]
)
MACHINES = ("_sysconfigdata", "config-", "plat-", "sitecustomize")  # beginnings of what differs between machines

Codes = NDArray[np.uint8]
Windows = NDArray[np.int64]


def chars(count: int, seed: int, length: int = LENGTH) -> tuple[Windows, Windows]:
    """Draw `count` training windows of the stream `seed`, and the character that follows each character.

    Args:
        count: number of windows, at least 1.
        seed: non-negative; of where the windows start.
        length: characters in a window, T, at least 1.

    Returns:
        Characters [count, T] and the characters one further on [count, T], int64, indices into `VOCABULARY`.

    Raises:
        BadData: count, seed or length is out of range.
        MissingDependency: the source of the standard library is not installed.
    """
    return _chars(count, TRAIN, seed, length)


def held_out_chars(count: int = 2000, length: int = LENGTH) -> tuple[Windows, Windows]:
    """Draw the first `count` windows of the held-out files, which no training window reaches; see `chars`."""
    return _chars(count, HELD_OUT, 0, length)


def tags(count: int, seed: int, length: int = LENGTH) -> tuple[Windows, Windows]:
    """Draw windows as `chars` does, and what kind of token each character belongs to.

    Returns:
        Characters [count, T], indices into `VOCABULARY`, and kinds [count, T], indices into `TAGS`; int64.
    """
    return _tags(count, TRAIN, seed, length)


def held_out_tags(count: int = 2000, length: int = LENGTH) -> tuple[Windows, Windows]:
    """Draw the first `count` windows of the held-out files, which no training window reaches; see `tags`."""
    return _tags(count, HELD_OUT, 0, length)


def _chars(count: int, stream: int, seed: int, length: int) -> tuple[Windows, Windows]:
    text = _text(stream)
    starts = _starts(len(text), count, stream, seed, length)
    windows = _cut(text, starts, length + 1)
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def _tags(count: int, stream: int, seed: int, length: int) -> tuple[Windows, Windows]:
    text, kinds = _tagged(stream)
    starts = _starts(len(text), count, stream, seed, length)
    return _cut(text, starts, length), _cut(kinds, starts, length)


def _starts(size: int, count: int, stream: int, seed: int, length: int) -> Windows:
    """Draw where windows of length + 1 begin in a text of `size` characters, [count]."""
    if count < 1:
        raise BadData(f"source text: {count} windows were asked for; ask for 1 or more")
    if seed < 0:
        raise BadData(f"source text: the seed {seed} is negative; take 0 or more")
    if not 1 <= length < size:
        raise BadData(f"source text: a window of {length} characters; take 1 to {size - 1:,}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((TAG, stream, seed))))
    return (rng.random(count) * (size - length)).astype(np.int64)


def _cut(values: Codes, starts: Windows, length: int) -> Windows:
    return np.lib.stride_tricks.sliding_window_view(values, length)[starts].astype(np.int64)


@functools.cache
def _text(stream: int) -> Codes:
    """Join the files of one stream, [characters]."""
    return np.concatenate([encode(text) for text in _files(stream).values()])


@functools.cache
def _tagged(stream: int) -> tuple[Codes, Codes]:
    """Join the files of one stream and their kinds, [characters] each; a file that does not parse is left out."""
    texts, kinds = [], []
    for text in _files(stream).values():
        try:
            kinds.append(np.frombuffer(classify(text), np.uint8))
        except (tokenize.TokenError, SyntaxError):
            continue
        texts.append(encode(text))
    return np.concatenate(texts), np.concatenate(kinds)


def _files(stream: int) -> dict[str, str]:
    """Read the files of one stream in the order of their relative paths."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for name in sorted(_names(root)):
        if held_out_file(name) != (stream == HELD_OUT):
            continue
        try:
            with tokenize.open(root / name) as file:  # knows the coding line
                found[name] = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
    if not found:
        raise MissingDependency(f"{root}: no Python source here; install the .py files of the standard library")
    return found


def _names(root: Path) -> list[str]:
    """List the files of the library by relative path, with / between the parts."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _wanted(name)]
        inside = Path(folder).relative_to(root)
        names += [(inside / name).as_posix() for name in files if name.endswith(".py") and _wanted(name)]
    return names


def _wanted(name: str) -> bool:
    return name not in LEFT_OUT and not name.startswith(MACHINES)


def held_out_file(name: str) -> bool:
    """Say whether the file of this relative path ("json/decoder.py") is held out: a tenth are, by SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % SHARE == 0


def encode(text: str) -> Codes:
    """Turn characters into indices into `VOCABULARY`, [characters]."""
    table = np.zeros(128, np.uint8)
    table[[ord(character) for character in VOCABULARY[1:]]] = np.arange(1, len(VOCABULARY))
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return table[np.where(points < 128, points, 0)]


def classify(text: str) -> bytes:
    """Tell for each character of Python source the kind of token it belongs to.

    A definition is the name after `def` or `class`. An f-string is a string from its first quote to its last,
    whatever release of Python reads it. What is in no token is space.

    Args:
        text: a whole file.

    Returns:
        One byte per character, an index into `TAGS`.

    Raises:
        SyntaxError: the text is not Python.
        tokenize.TokenError: likewise.
    """
    kinds = bytearray(len(text))
    lines = [0]  # where each line begins
    for line in text.split("\n"):
        lines.append(lines[-1] + len(line) + 1)
    depth, opened, previous = 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, stop = (lines[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            opened = opened if depth else start
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            name, start = "STRING", opened
        if not depth:
            kind = TAGS.index(_kind(name, token.string, previous))
            kinds[start:stop] = bytes([kind]) * (min(stop, len(text)) - start)
        previous = token.string
    return bytes(kinds)


def _kind(name: str, text: str, previous: str) -> str:
    if name != "NAME":
        return {"NUMBER": "number", "STRING": "string", "COMMENT": "comment", "OP": "operator"}.get(name, "space")
    if keyword.iskeyword(text):
        return "keyword"
    return "definition" if previous in ("def", "class") else "name"
