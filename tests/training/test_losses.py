"""Losses by targets, by name, by function; what they mean per example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.errors import BadData, UsageError
from kfe_fx.training.losses import counted, cross_entropy, main_output, mean_square, resolve_loss, separable, settle

LOGITS, CLASSES = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])


def test_the_loss_follows_the_targets():
    assert resolve_loss(None, CLASSES).name == "cross-entropy"  # type: ignore[union-attr]
    assert resolve_loss(None, torch.randn(4)).name == "mse"  # type: ignore[union-attr]
    assert resolve_loss(None, None) is None
    assert resolve_loss("mse", CLASSES).name == "mse"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="give a function"):
        resolve_loss(3, CLASSES)


def test_classes_in_dim_one_or_last():
    torch.testing.assert_close(cross_entropy(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES))
    tokens, labels = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    torch.testing.assert_close(cross_entropy(tokens, labels), F.cross_entropy(tokens.transpose(1, 2), labels))
    torch.testing.assert_close(cross_entropy(tokens.transpose(1, 2), labels), cross_entropy(tokens, labels))
    torch.testing.assert_close(cross_entropy(LOGITS, CLASSES[:, None]), cross_entropy(LOGITS, CLASSES))
    for bad in (torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(BadData, match="do not fit the output"):
            cross_entropy(LOGITS, bad)
    with pytest.raises(BadData, match="do not fit the output"):
        cross_entropy(torch.randn(4, 1), CLASSES)


def test_values_of_another_shape_are_refused():
    torch.testing.assert_close(mean_square(torch.ones(4, 1), torch.zeros(4)), torch.tensor(1.0))
    with pytest.raises(BadData, match="do not fit"):
        mean_square(torch.ones(4, 2), torch.zeros(4))


def test_the_main_output_of_several():
    scores = torch.randn(4, 3)
    assert main_output({"index": CLASSES, "size": torch.tensor(1.0), "scores": scores}) is scores
    assert main_output((CLASSES, torch.ones(4))).shape == (4,)
    with pytest.raises(UsageError, match="no floating-point output"):
        main_output([CLASSES])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reduction_is_found(reduction: str):
    expected = F.cross_entropy(LOGITS, CLASSES, reduction="sum")
    plain = resolve_loss(lambda o, t: F.cross_entropy(o["y"][0], t, reduction=reduction), CLASSES)
    known = resolve_loss(nn.CrossEntropyLoss(reduction=reduction), CLASSES)
    for loss, outputs in ((plain, {"y": (LOGITS,)}), (known, LOGITS)):
        assert loss is not None
        settled = settle(loss, outputs, CLASSES, 4)
        assert settled.reduction == reduction
        torch.testing.assert_close(settled.total(outputs, CLASSES, 4), expected)
        torch.testing.assert_close(settled.mean(outputs, CLASSES, 4), expected / 4)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda o, t: 1.0, "returns a float"),
        (lambda o, t: o, "return a mean, a sum or"),
        (lambda o, t: o.square().sum() ** 2, "no meaning per example"),
    ],
)
def test_losses_that_mean_nothing(function, told: str):
    loss = resolve_loss(function, CLASSES)
    assert loss is not None
    with pytest.raises(UsageError, match=told):
        settle(loss, LOGITS, CLASSES, 4)


def test_a_function_is_known_by_what_it_is_and_not_by_its_name():
    def mse(outputs: Any, targets: Tensor) -> Tensor:
        return (outputs - outputs.mean(0)).square().mean() + targets.sum() * 0

    own = resolve_loss(mse, CLASSES)
    assert own is not None
    assert (own.name, own.kind) == ("mse", "")
    assert [resolve_loss(name, None).kind for name in ("mse", "cross-entropy")] == ["mse", "cross-entropy"]  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="mixes the examples"):
        separable(settle(own, LOGITS, CLASSES, 4), LOGITS, CLASSES, 4)


def test_a_function_from_a_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(outputs, targets):\n    return (outputs.sum(1) - targets) ** 2\nnumber = 3\n")
    loss = resolve_loss(f"{file}:loss", CLASSES)
    assert loss is not None
    assert settle(loss, LOGITS, CLASSES, 4).reduction == "none"
    for reference, told in (
        (f"{file}:other", "defines no"),
        (f"{file}:number", "int, not a function"),
        (f"{tmp_path / 'none.py'}:loss", "no such file"),
        ("nowhere.at.all:loss", "there is no module 'nowhere'"),
        ("loss", "does not name a function"),
    ):
        with pytest.raises(UsageError, match=told):
            resolve_loss(reference, CLASSES)
    file.write_text("def loss(:\n")
    with pytest.raises(UsageError, match="SyntaxError"):
        resolve_loss(f"{file}:loss", CLASSES)


@pytest.mark.parametrize("last", [False, True])
def test_labels_that_do_not_count_leave_a_loss_of_each_example(last: bool):
    logits = torch.randn(6, 4, 5, dtype=torch.float64)  # [N, T, C]
    labels = torch.randint(0, 5, (6, 4))
    labels[0, 1:], labels[3] = -100, -100
    scores = logits if last else logits.movedim(2, 1)
    plain = resolve_loss(None, labels)
    assert counted(plain, [torch.randint(0, 5, (6, 4))]) == plain
    assert counted(plain, [None]) == counted(plain, [torch.full((6, 4), -100)]) == plain
    loss = counted(plain, [labels[:2], labels[2:]])
    assert loss is not None
    valid = int((labels != -100).sum())
    assert loss.positions == valid / 6
    whole = float(F.cross_entropy(logits.movedim(2, 1), labels))  # over what counts
    for size in (1, 2, 5, 6):
        total = sum(float(loss.total(scores[i : i + size], labels[i : i + size], size)) for i in range(0, 6, size))
        assert total / 6 == pytest.approx(whole, rel=1e-12)
    assert float(loss.mean(scores, labels, 6)) == pytest.approx(whole, rel=1e-12)
    assert float(loss.mean(scores[3:4], labels[3:4], 1)) == 0  # nothing counts here


def test_a_loss_that_is_not_finite_is_told_as_that():
    loss = resolve_loss(lambda outputs, targets: outputs.sum() * torch.nan, CLASSES)
    assert loss is not None
    with pytest.raises(BadData, match="is nan on a batch"):
        settle(loss, LOGITS, CLASSES, 4)
