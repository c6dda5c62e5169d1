from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kfe_fx.data import ArrayData, load_data, source_text, validate_against
from kfe_fx.data.factory import from_python
from kfe_fx.data.glyphs import CLASSES, glyphs, held_out
from kfe_fx.errors import BadData, MissingDependency

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def only(data: ArrayData) -> torch.Tensor:
    assert isinstance(data.inputs, tuple)
    return data.inputs[0]


def refused(spec: str | Path, text: str) -> None:
    with pytest.raises(BadData, match=text) as caught:
        load_data(spec)
    assert "\n" not in str(caught.value)


class TestBuiltIn:
    def test_glyphs(self):
        data = load_data("glyphs:30:7")
        images, labels = glyphs(30, 7)
        assert np.array_equal(only(data).numpy(), images)
        assert data.targets is not None
        assert data.targets.tolist() == labels.tolist()
        assert data.classes == tuple(CLASSES)
        assert np.array_equal(only(load_data("glyphs:20000", limit=10)).numpy(), glyphs(10, 0)[0])

    def test_held_out(self):
        assert np.array_equal(only(load_data("glyphs:held-out:12")).numpy(), held_out(12)[0])

    def test_glyphs_are_drawn_as_large_as_they_are_read(self):
        images, labels = glyphs(12, 3, size=28)
        rows = torch.zeros(2, 1, 40, 28)  # captured with 40 rows, and reads as many as there are
        with pytest.raises(BadData, match=r"\[N,1,28,28\], the network reads \[N,1,40,28\]"):
            load_data("glyphs:12:3", rows)
        data = validate_against(load_data("glyphs:12:3"), rows, ["x"], {"x": {0: "batch", 2: "length"}})
        assert np.array_equal(only(data).numpy(), images)
        assert data.targets is not None
        assert data.targets.tolist() == labels.tolist()
        square = torch.zeros(1, 1, 28, 28)
        assert np.array_equal(only(load_data("glyphs:held-out:40", square, limit=9)).numpy(), held_out(9, 28)[0])
        # chosen and scaled examples stay so
        training, _ = load_data("glyphs:12:3?mean=2&std=4").split(0.5)
        drawn = only(validate_against(training, square))
        kept = validate_against(load_data("glyphs:12:3").split(0.5)[0], square)
        assert kept.name == training.name.replace("?mean=2&std=4", "")
        torch.testing.assert_close(drawn, (only(kept) - 2.0) / 4.0, rtol=0, atol=1e-6)
        assert only(kept).shape == (6, 1, 28, 28)

    @pytest.mark.parametrize("example", [torch.zeros(1, 1, 224, 224), torch.zeros(1, 3, 28, 28), torch.zeros(1, 784)])
    def test_what_glyphs_cannot_become(self, example: torch.Tensor):
        with pytest.raises(BadData, match=r"inputs is \[N,1,\d+,\d+\], the network reads"):
            load_data("glyphs:3", example)

    def test_digits_stay_as_they_are(self):
        with pytest.raises(BadData, match=r"inputs is \[N,1,8,8\], the network reads"):
            load_data("digits", torch.zeros(1, 1, 28, 28))

    def test_source_text(self):
        data = load_data("chars:30:7", torch.zeros(1, 100, dtype=torch.int32), classes=98)
        assert data.targets is not None
        windows, following = source_text.chars(30, 7)
        assert np.array_equal(only(data).numpy(), windows)
        assert only(data).dtype == torch.int32
        assert np.array_equal(data.targets.numpy(), following)
        assert data.classes == source_text.VOCABULARY
        assert np.array_equal(only(load_data("chars:20000", limit=10)).numpy(), source_text.chars(10, 0)[0])
        held = load_data("chars:held-out:12")
        assert np.array_equal(only(held).numpy(), source_text.held_out_chars(12)[0])
        tagged = load_data("tags:held-out:12", classes=8)
        assert torch.equal(only(tagged), only(held))
        assert tagged.targets is not None
        assert np.array_equal(tagged.targets.numpy(), source_text.held_out_tags(12)[1])
        assert tagged.classes == source_text.TAGS

    @pytest.mark.parametrize("name", ["glyphs", "chars", "tags"])
    def test_without_a_count(self, name: str):
        assert torch.equal(only(load_data(name, limit=3)), only(load_data(f"{name}:3")))

    @pytest.mark.parametrize("name", ["chars", "tags"])
    def test_without_a_limit_either(self, name: str):
        assert len(load_data(name)) == 10_000

    @pytest.mark.parametrize("spec", ["chars:", "chars:many", "tags:5:1:1", "tags:held-out:5:1"])
    def test_misspelt_source_text(self, spec: str):
        refused(spec, "is not (chars|tags):COUNT.*; try (chars|tags):20000")

    def test_digits(self):
        data = load_data("digits", torch.zeros(1, 1, 8, 8), classes=10)
        assert only(data).shape == (1797, 1, 8, 8)
        assert float(only(data).max()) == 1.0
        assert len(data.classes) == 10

    @pytest.mark.parametrize(
        "spec", ["glyphs:", "glyphs:many", "glyphs:-5", "glyphs:5:1:1", "glyphs:held-out:5:1", "glyphs:٣"]
    )
    def test_misspelt(self, spec: str):
        refused(spec, "is not glyphs:COUNT")

    def test_none(self):
        refused("glyphs:0", "ask for 1 or more")

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(MissingDependency, match="pip install scikit-learn"):
            load_data("digits")


class TestNpz:
    def test_checked_against_the_network(self, tmp_path: Path):
        path = tmp_path / "a.npz"
        np.savez(path, x=X.double().numpy(), y=Y.numpy())
        data = load_data(path, torch.zeros(1, 2), classes=3)
        assert only(data).dtype == torch.float32
        with pytest.raises(BadData, match=r"\[N,2\], the network reads \[N,5\]"):
            load_data(path, torch.zeros(1, 5))
        with pytest.raises(BadData, match="label 2 at"):
            load_data(path, classes=2)
        assert len(load_data(path, limit=4)) == 4

    def test_not_finite(self, tmp_path: Path):
        values = X.numpy().copy()
        values[3, 1] = np.nan
        np.savez(tmp_path / "a.npz", x=values, y=Y.numpy())
        refused(tmp_path / "a.npz", r"1 NaN or infinite value in 1 of 6 examples, the first at \[3,1\]")

    def test_scaling(self, tmp_path: Path):
        path = tmp_path / "a.npz"
        pixels = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)
        np.savez(path, x=pixels)
        example = torch.zeros(1, 3, 2, 2)
        with pytest.raises(BadData, match=r"\?scale=255"):
            load_data(path, example)
        scaled = only(load_data(f"{path}?scale=255", example))
        torch.testing.assert_close(scaled, torch.from_numpy(pixels) / 255.0, rtol=0, atol=0)
        full = only(load_data(f"{path}?scale=2&mean=1,2,3&std=4", example))
        mean = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
        torch.testing.assert_close(full, (torch.from_numpy(pixels) / 2.0 - mean) / 4.0)
        refused(f"{path}?scale=255&mean=1,2", "mean has 2 values, inputs has 3 channels")
        refused(f"{path}?size=255", "unknown option 'size'")
        refused(f"{path}?scale=many", "is not a number")
        refused(f"{path}?scale=0", "above 0")
        refused(f"{path}?std=nan", "finite")
        refused(f"{path}?scale=1,2", "several values")

    def test_a_file_of_that_very_name(self, tmp_path: Path):
        path = tmp_path / "a.npz?scale=255"
        with path.open("wb") as stream:
            np.savez(stream, x=X.numpy())
        assert torch.equal(only(load_data(path)), X)


class TestImages:
    def folder(self, root: Path, mode: str = "L", size: tuple[int, int] = (5, 4)) -> Path:
        for label, name in enumerate(["zebra", "ant"]):
            (root / name).mkdir(parents=True)
            for i in range(2):
                Image.new(mode, size, (label * 100 + i) if mode == "L" else (label, i, 7)).save(
                    root / name / f"{i}.png"
                )
        return root

    def test_grey(self, tmp_path: Path):
        folder = self.folder(tmp_path / "set")
        (folder / "ant" / "Thumbs.db").write_text("no image")
        (folder / "ant" / "._0.png").write_text("no image")
        data = load_data(folder)
        assert only(data).shape == (4, 1, 4, 5)
        assert only(data).dtype == torch.uint8
        assert data.classes == ("ant", "zebra")
        assert data.targets is not None
        assert data.targets.tolist() == [0, 0, 1, 1]
        assert only(data)[:, 0, 0, 0].tolist() == [100, 101, 0, 1]
        with pytest.raises(BadData, match=r"uint8, the network reads float32.*\?scale"):
            load_data(folder, torch.zeros(1, 1, 4, 5))
        assert only(load_data(f"{folder}?scale=255", torch.zeros(1, 1, 4, 5))).dtype == torch.float32

    def test_one_colour_image_makes_all_colour(self, tmp_path: Path):
        folder = self.folder(tmp_path / "set")
        Image.new("RGB", (5, 4), (1, 2, 3)).save(folder / "ant" / "9.png")
        images = only(load_data(folder))
        assert images.shape == (5, 3, 4, 5)
        assert images[2, :, 0, 0].tolist() == [1, 2, 3]

    def test_sizes_differ(self, tmp_path: Path):
        folder = self.folder(tmp_path / "set")
        Image.new("L", (6, 4)).save(folder / "zebra" / "odd.png")
        refused(folder, r"zebra/odd.png: is 6 x 4 pixels where 0.png is 5 x 4")

    def test_damaged(self, tmp_path: Path):
        folder = self.folder(tmp_path / "set")
        (folder / "ant" / "bad.png").write_bytes(b"not a picture")
        refused(folder, "ant/bad.png: not a readable image")
        whole = (folder / "ant" / "0.png").read_bytes()
        (folder / "ant" / "bad.png").write_bytes(whole[: len(whole) - 20])
        refused(folder, "ant/bad.png: not a readable image")

    def test_empty(self, tmp_path: Path):
        refused(tmp_path, "has no sub-folders")
        folder = self.folder(tmp_path / "set")
        (folder / "bee").mkdir()
        refused(folder, "bee: this class has no images")


class TestFactory:
    @pytest.mark.parametrize(
        "body",
        [
            "return X, Y",
            "return X.numpy(), Y.numpy()",
            "return TensorDataset(X, Y)",
            "return DataLoader(TensorDataset(X, Y), batch_size=4)",
            "return ((X[i:i + 2], Y[i:i + 2]) for i in range(0, 6, 2))",
            "return [(X[:2], Y[:2]), (X[2:], Y[2:])]",
            "return [(X[:3], Y[:3]), (X[3:], Y[3:])]",
            "from kfe_fx.data import ArrayData\n    return ArrayData((X,), Y)",
        ],
    )
    def test_what_may_be_returned(self, tmp_path: Path, body: str):
        source = tmp_path / "mine.py"
        source.write_text(
            "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
            "X = torch.arange(12.0).reshape(6, 2)\nY = torch.tensor([0, 1, 2, 0, 1, 2])\n"
            f"def make():\n    {body}\n"
        )
        data = load_data(f"{source}:make", torch.zeros(1, 2), classes=3)
        assert torch.equal(only(data), X)
        assert data.targets is not None
        assert torch.equal(data.targets, Y)

    def test_dicts_and_several_inputs(self):
        data = from_python([{"ids": Y[:4], "labels": Y[:4]}, {"ids": Y[4:], "labels": Y[4:]}])
        assert isinstance(data.inputs, dict)
        assert data.inputs["ids"].tolist() == Y.tolist()
        assert data.targets is not None
        pair = from_python(((X, X + 1), Y))
        assert isinstance(pair.inputs, tuple)
        assert len(pair.inputs) == 2
        assert from_python(X).targets is None
        assert from_python((X, None)).targets is None
        assert isinstance(from_python({"ids": X}).inputs, dict)
        assert from_python((X, X)).targets is not None

    def test_a_stream_without_end(self):
        def stream():
            while True:
                yield X, Y

        assert len(from_python(stream(), limit=15)) == 15

    def test_iterable_dataset(self):
        class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
            def __iter__(self):
                yield from zip(X, Y, strict=True)

        assert torch.equal(only(from_python(Stream())), X)
        assert torch.equal(only(from_python(DataLoader(TensorDataset(X, Y), batch_size=5), limit=4)), X[:4])

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "got NoneType; return"),
            ("text", "got str"),
            ([], "yields no batches"),
            ([3], "a batch is a int"),
            ([("a", Y)], "a batch is a tuple"),
            ([(X, "b")], "targets is a str"),
            ([(X, Y), (X[:, :1], Y)], r"examples of \[2\] and \[1\]; pad or crop"),
            ([(X, Y), X], "batches differ"),
            ((X, Y[:2]), "lengths differ"),
            ([{"a": X, "y": Y, "labels": Y}], "both 'y' and 'labels'"),
            ((np.array([object()]), Y), "not numbers"),
        ],
    )
    def test_what_may_not(self, value: object, text: str):
        with pytest.raises(BadData, match=text):
            from_python(value, "mine")

    def test_no_such_thing(self, tmp_path: Path):
        refused(f"{tmp_path}/none.py:make", "no such file")
        refused("no_such_package_of_mine:make", "there is no module")
        source = tmp_path / "mine.py"
        source.write_text("x = 1\n")
        refused(f"{source}:make", "defines no 'make'")
        source.write_text("def broken(:\n")
        refused(f"{source}:make", r"raised SyntaxError: .*mine.py, line 1")
        source.write_text("import no_such_package_of_mine\n")
        refused(f"{source}:make", r"raised ModuleNotFoundError: .*no_such_package_of_mine.*mine.py:1")


def test_no_such_data(tmp_path: Path):
    refused(tmp_path / "none.npz", "no such file; give an .npz, a folder")
