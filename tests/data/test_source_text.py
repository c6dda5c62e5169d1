from __future__ import annotations

import itertools
import keyword
import re
from pathlib import Path

import numpy as np
import pytest

from kfe_fx.data import source_text as module
from kfe_fx.data.source_text import TAGS, VOCABULARY, chars, classify, encode, held_out_chars, held_out_tags, tags
from kfe_fx.errors import BadData, MissingDependency

SOURCE = '''class A(B):
    def f(self, x=1.5):  # hé
        """doc
        é"""
        y = f"a{x!r:>{w}}b {f'in'}" + rb'q' \\
            + "é" * 3
        match x:
            case None: return
'''
LETTERS = dict(zip(TAGS, ".kndNs#o", strict=True))
KINDS = """
kkkkk.donoo
....kkk.donnnno.noNNNoo..####
........ssssss
ssssssssssss
........n.o.sssssssssssssssssssssss.o.sssss..
............o.sss.o.N
........nnnnn.no
............nnnn.kkkko.kkkkkk
"""


def spelt(kinds: bytes, text: str) -> str:
    """Write one letter per character and the line ends of the text."""
    return "".join(end if end == "\n" else LETTERS[TAGS[kind]] for kind, end in zip(kinds, text, strict=True))


def decoded(codes: np.ndarray) -> str:
    return "".join(VOCABULARY[code] if code else "?" for code in codes)


def test_vocabulary():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 98
    assert len(VOCABULARY) != module.LENGTH
    text = "".join(VOCABULARY[1:])
    assert text.isascii()
    assert encode(text).tolist() == list(range(1, 98))
    assert encode("é\x0c\r\x00😀a").tolist() == [0, 0, 0, 0, 0, VOCABULARY.index("a")]


def test_kinds_of_a_file_written_out():
    kinds = classify(SOURCE)
    assert len(kinds) == len(SOURCE)
    assert spelt(kinds, SOURCE) == KINDS[1:]
    assert classify("") == b""
    assert spelt(classify("x = 1"), "x = 1") == "n.o.N"


@pytest.mark.parametrize("text", ["x = (1\n", 'x = """open\n', "if x:\n    y\n  z\n"])
def test_what_is_not_python(text: str):
    with pytest.raises((SyntaxError, module.tokenize.TokenError)):
        classify(text)


def test_kinds_of_the_held_out_files():
    # each kind by what it looks like, without a tokenizer
    patterns = {
        "space": r"[\s\\?]+",  # a form feed reads as "?"
        "keyword": "(" + "|".join(keyword.kwlist) + ")+",
        "name": r"[A-Za-z_?][A-Za-z_0-9?]*",
        "definition": r"[A-Za-z_?][A-Za-z_0-9?]*",
        "number": r"[0-9.][0-9A-Za-z_.+-]*",
        "string": r"([A-Za-z]{0,2}['\"])(?s:.*)['\"]",
        "comment": r"#[^\n]*",
        "operator": r"[-+*/%@&|^~<>=!:;,.()\[\]{}]+",
    }
    codes, kinds = module._tagged(module.HELD_OUT)
    text = decoded(codes)
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for start, stop in itertools.pairwise(cuts):
        kind = TAGS[kinds[start]]
        assert re.fullmatch(patterns[kind], text[start:stop]), (kind, text[start:stop])
    assert set(kinds.tolist()) == set(range(len(TAGS)))


def test_shapes_and_types():
    x, y = chars(30, 3)
    assert x.shape == y.shape == (30, 100)
    assert x.dtype == y.dtype == np.int64
    assert np.array_equal(x[:, 1:], y[:, :-1])
    assert 0 <= x.min() <= x.max() < len(VOCABULARY)
    windows, kinds = held_out_tags(30)
    assert np.array_equal(windows, held_out_chars(30)[0])
    assert windows.shape == kinds.shape == (30, 100)
    assert windows.dtype == kinds.dtype == np.int64
    assert 0 <= kinds.min() <= kinds.max() < len(TAGS)
    assert chars(2, 0, length=7)[1].shape == held_out_tags(2, length=7)[1].shape == (2, 7)


@pytest.mark.parametrize("draw", [chars, tags])
def test_the_same_seed_gives_the_same_windows_and_the_longer_set_begins_with_the_shorter(draw):
    short, long = draw(30, 5), draw(2000, 5)
    assert np.array_equal(short[0], long[0][:30])
    assert np.array_equal(short[1], long[1][:30])
    assert not np.array_equal(short[0], draw(30, 6)[0])
    held = (held_out_chars if draw is chars else held_out_tags)(40)
    assert not np.array_equal(short[0], held[0][:30])
    again = (held_out_chars if draw is chars else held_out_tags)(30)
    assert np.array_equal(again[1], held[1][:30])


def test_windows_are_cut_from_their_own_files():
    streams = [module._text(stream).tobytes() for stream in (module.TRAIN, module.HELD_OUT)]
    windows = [chars(200, 0)[0].astype(np.uint8), held_out_chars(200)[0].astype(np.uint8)]
    for own, other, drawn in zip(streams, streams[::-1], windows, strict=True):
        assert all(window.tobytes() in own for window in drawn)
        # a licence or a line of dashes may stand in two files, and little else
        assert sum(window.tobytes() in other for window in drawn) <= 6
    last = module._starts(1000, 5000, 0, 0, 100)
    assert 0 <= last.min() < 10
    assert 890 <= last.max() <= 899  # the target of its last character is the last one of the text


def test_files_are_trained_on_or_held_out():
    train, held = (module._files(stream) for stream in (module.TRAIN, module.HELD_OUT))
    assert not train.keys() & held.keys()
    assert 0.04 < len(held) / len(train | held) < 0.16
    assert list(train) == sorted(train)
    # the same in every release of Python
    assert [name for name in ("ast.py", "enum.py", "http/client.py") if not module.held_out_file(name)] == []
    assert [name for name in ("os.py", "json/decoder.py", "typing.py") if module.held_out_file(name)] == []


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    return tmp_path


def test_what_is_read(library: Path):
    wanted = ["package/__init__.py", "package/deep/three.py", "two.py", *(f"m{i}.py" for i in range(40))]
    passed = ["test/a.py", "package/tests/b.py", "site-packages/c.py", "config-3-x86/d.py", "_sysconfigdata_x.py"]
    for name in [*wanted, *passed, "notes.txt"]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"name = {name!r}\n")
    (library / "undecodable.py").write_bytes(b"x = '\xff'\n")
    (library / "two.py").write_bytes(b"# -*- coding: latin-1 -*-\r\nx = '\xe9'\r\n")
    files = [module._files(stream) for stream in (module.TRAIN, module.HELD_OUT)]
    found = files[0] | files[1]
    assert sorted(found) == sorted(wanted)
    assert found["two.py"] == "# -*- coding: latin-1 -*-\nx = 'é'\n"
    # what does not parse has no kinds
    assert len(module._tagged.__wrapped__(module.TRAIN)[0]) == sum(len(text) for text in files[0].values())
    broken = next(iter(files[0]))
    (library / broken).write_text("x = (\n")
    codes, kinds = module._tagged.__wrapped__(module.TRAIN)
    assert len(codes) == len(kinds) == sum(len(text) for name, text in files[0].items() if name != broken)


def test_no_library(library: Path):
    with pytest.raises(MissingDependency, match="no Python source here; install") as caught:
        module._files(module.TRAIN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0, 0), "0 windows"), ((5, -1), "seed -1"), ((5, 0, 0), "window of 0"), ((5, 0, 10**9), "window of 1000000000")],
)
@pytest.mark.parametrize("draw", [chars, tags])
def test_bad_arguments(draw, arguments: tuple[int, ...], text: str):
    with pytest.raises(BadData, match=text):
        draw(*arguments)
