"""Distillation: gradients by hand, what is plain training to the bit, no targets, activations, resuming, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import kfe_fx
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadData, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.branches import find_branches
from kfe_fx.passes.drop_branches import DropBranches
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.structure import pack
from kfe_fx.training import finetune
from kfe_fx.training.batches import Batches
from kfe_fx.training.distil import Distillation, Teaching, teach
from kfe_fx.training.features import kept_features
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.metrics import ACCURACY, MSE, evaluate
from kfe_fx.training.soft_targets import softened
from tests.processes import in_two_processes

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "seed": 3, "threads": 1}
close = torch.testing.assert_close
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}


class Net(nn.Module):
    """A batch norm and dropout, so that evaluation and training differ."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.3)
        self.act, self.last = nn.ReLU(), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.act(self.norm(self.first(x)))))


class Plain(nn.Module):
    """The same in evaluation and in training."""

    def __init__(self, hidden: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


def made(seed: int, kind: type[nn.Module] = Plain, **options: Any) -> Program:
    torch.manual_seed(seed)
    return capture(kind(**options).double(), torch.randn(2, 6).double())


def examples(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).double()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def weights(program: Program) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in program.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def teaching(program: Program, data: Any, loss: Any = None, **options: Any) -> Teaching:
    batches = Batches(program, data, 20)
    targets = batches.targets()
    found = teach(program, batches, targets, resolve_loss(loss, targets), **options)
    assert found is not None
    found.begin(next(iter(found.batches)))
    return found


def part(found: Teaching) -> Tensor:
    """Return the teacher's part of the loss on the first batch, in evaluation mode."""
    lesson = next(iter(found.batches))
    flat, activations = found.run(lesson.inputs, "eval")
    return found.term(pack(found.program.signature.outputs["eval"], flat), activations, lesson)


def gradients(found: Teaching) -> dict[str, Tensor]:
    """Return its gradient."""
    module, value = found.program.module(), part(found)
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, torch.autograd.grad(value, list(module.parameters())), strict=True))


# the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_by_hand(temperature: float):
    """T² KL and its gradient T (p - q) / positions, against the formula written out."""
    torch.manual_seed(0)
    scores, teacher = torch.randn(4, 3, 5).double().requires_grad_(), 3 * torch.randn(4, 3, 5).double()
    p, q = (torch.softmax(value / temperature, 1) for value in (scores, teacher))
    value = softened(scores, teacher, temperature)
    close(value, temperature**2 * (q * (q.log() - p.log())).sum(1).mean(), **TIGHT)
    (grad,) = torch.autograd.grad(value, scores)
    close(grad, temperature * (p - q).detach() / 20, **TIGHT)
    counted = torch.rand(4, 5) > 0.5
    (grad,) = torch.autograd.grad(softened(scores, teacher, temperature, counted), scores)
    close(grad, temperature * ((p - q) * counted.unsqueeze(1)).detach() / counted.sum(), **TIGHT)
    assert softened(scores, teacher, 1.0, torch.zeros(4, 5, dtype=torch.bool)).item() == 0.0


def test_the_gradient_of_soft_targets_keeps_its_size():
    """At high temperatures it goes to that of half the mean square of centred scores over C: T² is the right factor."""
    torch.manual_seed(0)
    scores, teacher = torch.randn(50, 7).double().requires_grad_(), torch.randn(50, 7).double()
    (hot,) = torch.autograd.grad(softened(scores, teacher, 1e6), scores)
    apart = scores - teacher
    close(hot, ((apart - apart.mean(1, keepdim=True)) / 7 / 50).detach(), rtol=0, atol=1e-7)  # of 1e-2; O(1 / T)


def test_a_class_that_is_ruled_out_gives_numbers():
    scores, teacher = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    scores[:, 1] = teacher[:, 1] = -torch.inf
    scores.requires_grad_()
    value = softened(scores, teacher, 2.0)
    (grad,) = torch.autograd.grad(value, scores)
    close(value, softened(scores[:, ::2], teacher[:, ::2], 2.0))
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("w", [0.3, 0.9])
@pytest.mark.parametrize("targets", ["classes", "values"])
def test_a_step_is_plain_training_on_the_formula(w: float, targets: str):
    """Two epochs of SGD, against a loop of one's own over modules of torch."""
    student, teacher = Plain().double(), Net().double()
    x, y = examples()
    y = y if targets == "classes" else torch.randn(60, 3).double()
    program, wise = capture(student, x[:2]), capture(teacher, x[:2])
    with torch.no_grad():
        teacher.eval()
        said = teacher(x)
    heat = {"temperature": 2.0} if targets == "classes" else {}
    facts = finetune(program, (x, y), schedule="constant", teacher=wise, distil=w, **heat, **SETTINGS)
    groups = [{"params": [p for p in student.parameters() if p.dim() > 1], "weight_decay": 5e-4}]
    groups += [{"params": [p for p in student.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    for epoch in range(2):
        for rows in torch.randperm(60, generator=torch.Generator().manual_seed(3 + epoch)).split(20):
            optimizer.zero_grad()
            out = student(x[rows])
            if targets == "classes":
                soft = F.kl_div(F.log_softmax(out / 2, 1), torch.softmax(said[rows] / 2, 1), reduction="batchmean")
                loss = (1 - w) * F.cross_entropy(out, y[rows]) + w * 4 * soft
            else:
                loss = (1 - w) * F.mse_loss(out, y[rows]) + w * F.mse_loss(out, said[rows])
            loss.backward()
            optimizer.step()
    for name, value in student.state_dict().items():
        close(program.state_dict()[name], value, **TIGHT)
    match = "cross-entropy" if targets == "classes" else "mse"
    told = {"weight": w, "temperature": heat.get("temperature"), "match": match, "features": []}
    assert facts["distillation"].items() >= told.items()
    assert facts["loss"] == match


def test_without_a_share_it_is_plain_fine_tuning_to_the_bit():
    for kind in (Net, Plain):
        one, other = made(0, kind), made(0, kind)
        plain = finetune(one, examples(), **SETTINGS)
        taught = finetune(other, examples(), teacher=made(1), distil=0, **SETTINGS)
        assert same(weights(one), weights(other))
        assert taught.pop("distillation")["weight"] == 0.0
        assert taught == plain


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_the_teacher_never_changes(share: float):
    program, teacher = made(0, Net), made(1, Net)
    teacher.train()  # it is asked in evaluation mode all the same
    before = weights(teacher)
    finetune(program, examples(), teacher=teacher, distil=share, **SETTINGS)
    assert same(before, weights(teacher))
    assert teacher.module().training
    assert all(parameter.grad is None for parameter in teacher.module().parameters())


def test_the_targets_have_no_say_where_the_teacher_has_all():
    x, y = examples()
    runs = []
    for targets in (y, 2 - y, None):
        program = made(0)
        facts = finetune(program, (x, targets), "cross-entropy", teacher=made(1), distil=1, **SETTINGS)
        runs.append((weights(program), facts["first_loss"], facts["loss"]))
    assert all(same(runs[0][0], other[0]) and runs[0][1:] == other[1:] for other in runs[1:])
    assert runs[0][2] == "distillation (cross-entropy)"


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_a_twin_has_nothing_to_learn(loss: str):
    program = made(0)
    found = teaching(program, (examples()[0], None), loss, teacher=program)
    for grad in gradients(found).values():
        assert grad.abs().max() < 1e-16
    assert part(found).item() == 0.0


def test_a_network_can_be_taught_by_what_it_was():
    """The same Program as teacher: it stays as it was when training began."""
    one, other = made(0, Net), made(0, Net)
    finetune(one, examples(), teacher=one, distil=0.5, **SETTINGS)
    finetune(other, examples(), teacher=made(0, Net), distil=0.5, **SETTINGS)
    assert same(weights(one), weights(other))


# what is compared ----------------------------------------------------------------------------------------------------


def test_what_is_compared_by_what():
    x, y = examples()
    values = torch.randn(60, 3).double()

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets.view(60 if len(outputs) == 60 else len(outputs), -1)[:, 0]).square()

    for targets, loss, told in (
        (y, None, "cross-entropy"),
        (values, None, "mse"),
        (None, None, "mse"),
        (None, "cross-entropy", "cross-entropy"),
        (y, own, "cross-entropy"),
        (values, own, "mse"),
        (None, own, "mse"),
        (torch.randint(0, 2, (60, 3)), own, "mse"),  # integers that are no classes
    ):
        found = teaching(made(0), (x, targets), loss, teacher=made(1))
        assert found.match.name == told
        assert found.weight == (1.0 if targets is None else 0.9)


def test_a_function_of_ones_own_compares():
    """Both its gradient and that a sum is found to be one."""

    def apart(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).abs().sum()

    program, teacher, x = made(0), made(1), examples()[0]
    found = teaching(program, (x, None), teacher=Distillation(teacher, match=apart))
    value = (program(x[:20]) - teacher(x[:20]).detach()).abs().sum() / 20
    grads = torch.autograd.grad(value, list(program.module().parameters()))
    for grad, wanted in zip(gradients(found).values(), grads, strict=True):
        close(grad, wanted, **TIGHT)
    assert found.match.reduction == "sum"


class Tagger(nn.Module):
    """Classes last, one set for each token."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, hidden), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


class Segmenter(nn.Module):
    """Classes in dim 1, one set for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 7, (20, 5), generator=g), torch.randint(0, 4, (20, 5), generator=g)


@pytest.mark.parametrize("given", [True, False])
def test_each_position_has_its_classes(given: bool):
    """Per position, padded ones left out, against the formula; without targets tokens and images tell their classes."""
    x, y = tokens()
    y[:, 3:] = -100
    program, teacher = (made_of(seed, Tagger, x) for seed in (0, 1))
    found = teaching(program, (x, y if given else None), "cross-entropy", teacher=teacher, distil=1.0)
    taken = slice(3) if given else slice(5)
    logs, wanted = (torch.log_softmax(one(x)[:, taken], 2) for one in (program, teacher))
    value = (wanted.exp() * (wanted - logs)).sum(2).mean()
    close(part(found), value, **TIGHT)
    images, pixels = torch.randn(20, 1, 3, 3).double(), torch.randint(0, 4, (20, 3, 3))
    program, teacher = (made_of(seed, Segmenter, images) for seed in (0, 1))
    found = teaching(program, (images, pixels if given else None), "cross-entropy", teacher=teacher, distil=1.0)
    logs, wanted = (torch.log_softmax(one(images), 1) for one in (program, teacher))
    value = (wanted.exp() * (wanted - logs)).sum(1).mean()
    close(part(found), value, **TIGHT)


def made_of(seed: int, kind: type[nn.Module], x: Tensor) -> Program:
    torch.manual_seed(seed)
    return capture(kind().double(), x[:2])


def test_the_ignored_target_is_that_of_the_loss():
    x, y = tokens()
    program, teacher = (made_of(seed, Tagger, x) for seed in (0, 1))

    class Loss(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().forward(outputs.flatten(0, 1), targets.flatten())

    found = teaching(program, (x, y), Loss(ignore_index=2), teacher=teacher, distil=1.0)
    logs, wanted = (torch.log_softmax(one(x), 2)[y != 2] for one in (program, teacher))
    close(part(found), (wanted.exp() * (wanted - logs)).sum(1).mean(), **TIGHT)


# activations ---------------------------------------------------------------------------------------------------------


def pruned(program: Program, removed: int) -> tuple[Program, Plan]:
    """Remove the first units."""
    analysis = analyze(program)
    plan = Plan.of_units(analysis, range(removed))
    return Shrink(plan).run(program).program, plan


def moved(program: Program) -> Program:
    with torch.no_grad():
        for value in program.module().parameters():
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).double()
    return program


@pytest.mark.parametrize("spelled", ["plan", "indices", "by dim"])
def test_activations_of_removed_units_are_left_out(spelled: str):
    teacher = made(0)
    program, plan = pruned(teacher, 5)
    moved(program)
    kept = dict(plan.kept["first.weight"])[0]
    assert len(kept) == 7
    features: Any = {
        "plan": kept_features(teacher, plan, ["act"], 0.5),
        "indices": {"act": (0.5, kept)},
        "by dim": {"act": (0.5, {1: kept})},
    }[spelled]
    x = examples()[0]
    found = teaching(program, (x, None), teacher=teacher, features=features)
    inner = [
        torch.tanh(F.linear(x[:20], one.tensor("first.weight"), one.tensor("first.bias"))) for one in (program, teacher)
    ]
    mine, theirs = inner[0], inner[1][:, kept].detach()
    value = (
        F.mse_loss(program(x[:20]), teacher(x[:20]).detach()) + 0.5 * F.mse_loss(mine, theirs) / theirs.square().mean()
    )
    grads = torch.autograd.grad(value, list(program.module().parameters()))
    for grad, wanted in zip(gradients(found).values(), grads, strict=True):
        close(grad, wanted, **TIGHT)
    assert found.facts()["features"] == ["act"]


class Deep(nn.Module):
    """Modules in modules, an activation that two modules share, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(6, 8, 1)
        self.body = nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 1))
        self.rnn, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem(x.unsqueeze(2))).transpose(1, 2)
        return self.head(self.rnn(y)[0][:, -1])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "ekfac"])
def test_activations_by_name_of_a_module(optimizer: str):
    """Also where an optimizer watches the network, with the same training as without them where their weight is 0."""
    teacher = made(0, Deep)
    settings = SETTINGS | {"optimizer": optimizer}
    runs = []
    for features in (None, {"body.*": 0.0, "stem": 0}, ["body.?", "rnn"] if optimizer != "ekfac" else ["body.?"]):
        program = made(1, Deep)
        facts = finetune(program, examples(), teacher=teacher, features=features, **settings)
        runs.append((weights(program), facts))
    assert same(runs[0][0], runs[1][0])
    assert not same(runs[0][0], runs[2][0])
    assert runs[1][1]["distillation"]["features"] == ["body.0", "body.1", "body.2", "body.3", "stem"]
    assert runs[2][1]["distillation"]["features"][:4] == ["body.0", "body.1", "body.2", "body.3"]


def test_activations_of_a_pruned_network_by_plan():
    teacher = made(0, Deep)
    analysis = analyze(teacher)
    group = next(group for group in analysis.groups if group.name.startswith("body.0"))
    gone = [unit.id for unit in analysis.units if unit.group == analysis.groups.index(group)][:3]
    plan = Plan.of_units(analysis, gone)
    program = Shrink(plan).run(teacher).program
    features = kept_features(teacher, plan, ["body.?", "rnn"])
    assert {name: [(dim, len(kept)) for dim, kept in changes] for name, (_, changes) in features.items()} == {
        "body.0": [(1, 5)], "body.1": [(1, 5)], "body.2": [(1, 5)], "body.3": [], "rnn": [],
    }  # fmt: skip
    found = teaching(program, (examples()[0], None), teacher=teacher, features=features)
    lesson = next(iter(found.batches))
    _, activations = found.run(lesson.inputs, "eval")
    assert [value.shape[1] for value in activations] == [5, 5, 5, 8, 1]


class Branched(nn.Module):
    """A residual branch that can go whole, between layers that lose units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv1d(6, 8, 1), nn.ReLU()
        self.branch = nn.Sequential(nn.Conv1d(8, 5, 1), nn.ReLU(), nn.Conv1d(5, 8, 1))
        self.top = nn.Sequential(nn.Conv1d(8, 7, 1), nn.ReLU())
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x.unsqueeze(2)))
        return self.head(self.top(y + self.branch(y)).mean(2))


def test_a_teacher_with_branches_that_went():
    """What is compared is where the branch was not, in the indices of the network without it."""
    teacher = made(0, Branched)
    name = find_branches(analyze(teacher))[0].name
    shallow = DropBranches((name,), always=True).run(teacher).program
    analysis = analyze(shallow)
    plan = Plan.of_units(analysis, [0, 1, len(analysis.units) - 1])
    program = Shrink(plan).run(shallow).program
    features = kept_features(shallow, plan, ["act", "top"])
    found = teaching(program, (examples()[0], None), teacher=teacher, features=features)
    assert found.facts()["features"] == ["act", "top"]
    _, activations = found.run(next(iter(found.batches)).inputs, "eval")
    assert sum(value.shape[1] for value in activations) == 8 + 7 - 3
    with pytest.raises(UsageError, match=r"no activation is called 'branch\.1'"):
        teaching(program, (examples()[0], None), teacher=teacher, features=["branch.1"])


# data ----------------------------------------------------------------------------------------------------------------


class Rowwise(nn.Module):
    """Says the same of an example, to the bit, in any batch: no kernel adds along rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[:, :3] * self.weight + x[:, 3:] * self.bias)


class Mixing(Rowwise):
    """Says of an example what depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x[:, :3].mean(0)


@pytest.mark.parametrize("features", [None, {"act": 0.5}])
def test_answers_that_are_kept_change_no_bit(features: Any):
    class Inner(Rowwise):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    runs = []
    for memory in (1 << 20, 0):
        program = made(0, Inner)
        teacher = Distillation(made(1, Inner), memory=memory, features=features)
        stages: list[str] = []
        facts = finetune(
            program, examples(70), teacher=teacher, **SETTINGS | {"epochs": 5},
            progress=lambda stage, done, stages=stages: stages.append(stage),
        )  # fmt: skip
        assert facts.pop("distillation")["remembered"] is bool(memory)
        assert ("asking the teacher" in stages) is bool(memory)
        runs.append((facts, weights(program)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_what_a_teacher_says_of_a_batch_is_not_kept():
    x, y = examples()
    for kind, data, epochs, told in (
        (Rowwise, (x, y), 2, True),
        (Rowwise, (x, y), 1, False),  # each is asked once anyway
        (Mixing, (x, y), 2, False),
        (Rowwise, TensorDataset(x, y), 2, False),  # it may draw its examples anew
        (Rowwise, [(x[:20], y[:20]), (x[20:40], y[20:40])], 2, False),
    ):
        settings = SETTINGS | {"epochs": epochs}
        facts = finetune(made(0, kind), data, teacher=made(1, kind), **settings)
        assert facts["distillation"]["remembered"] is told


def test_kept_answers_belong_to_their_examples():
    """Whatever the order: lessons of a shuffled epoch come with what the teacher says of these very examples."""
    x, y = examples(70)
    found = teaching(made(0, Rowwise), (x, y), teacher=made(1, Rowwise))
    found.remember(3, 100, None)
    assert found.batches.remembered
    for seed in (None, 5):
        for lesson in found.batches.epoch(seed, drop_last=seed is not None):
            assert lesson.told is not None  # type: ignore[attr-defined]
            assert torch.equal(lesson.told[0], found.teacher(lesson.inputs[0]))  # type: ignore[attr-defined]
            some = lesson.rows(3, 8)
            assert torch.equal(some.told[0], found.teacher(some.inputs[0]))  # type: ignore[attr-defined]


def test_every_form_of_data_without_targets():
    x = examples()[0]
    for data in (x, (x, None), ArrayData((x,)), TensorDataset(x), [(part,) for part in x.split(20)], iter(x.split(20))):
        program, teacher = made(0), made(1)
        before = evaluate(program, (x, teacher(x).detach()), MSE)
        facts = finetune(program, data, teacher=teacher, **SETTINGS | {"epochs": 4})
        assert evaluate(program, (x, teacher(x).detach()), MSE) < before
        assert (facts["loss"], facts["distillation"]["weight"]) == ("distillation (mse)", 1.0)
    facts = kfe_fx.train(made(0), x, teacher=made(1), **SETTINGS)
    assert "nothing held out" in facts["data"]
    assert facts["last_loss"] < facts["first_loss"]
    assert kfe_fx.train(made(0), examples(), **SETTINGS)["distillation"] is None


def test_a_pruned_network_comes_back_to_its_teacher_without_targets():
    """Half of the units go, and what is left learns of unlabelled examples to say what the whole one said."""
    x, y = examples(400)
    teacher = made(0, hidden=24)
    finetune(teacher, (x, y), epochs=40, lr=0.01, batch_size=50, threads=1)
    program, plan = pruned(teacher, 12)
    held = examples(400, seed=9)
    said = teacher(held[0]).detach()
    before, right = evaluate(program, (held[0], said), MSE), evaluate(program, held, ACCURACY)
    features = kept_features(teacher, plan, ["act"], 0.1)
    facts = finetune(
        program, (x, None), teacher=teacher, features=features, epochs=40, lr=0.01, batch_size=50, threads=1
    )
    assert evaluate(program, (held[0], said), MSE) < 0.02 * before
    assert evaluate(program, held, ACCURACY) > max(right, evaluate(teacher, held, ACCURACY) - 0.02)
    assert facts["last_loss"] < 0.05 * facts["first_loss"]


class Stream(nn.Module):
    """A cell whose state enters and leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, h)
        return self.head(state), state


def test_a_teacher_takes_states_as_wide_as_they_were():
    """A narrowed network gets its part of each state, and what the teacher returns of one is cut to it."""
    from kfe_fx.labels.states import permit

    torch.manual_seed(0)
    x, h = torch.randn(40, 6).double(), torch.randn(40, 8).double()
    teacher = capture(Stream().double(), (x[:2], h[:2]))
    free = permit(teacher, allowed=True)
    plan = Plan.of_units(analyze(free), [0, 1, 2])
    program = moved(Shrink(plan).run(free).program)
    assert [tuple(value.shape) for value in program.flat_examples()] == [(2, 6), (2, 5)]
    found = teaching(program, ((x, h), None), teacher=teacher)
    lesson = next(iter(found.batches))
    assert lesson.asked is not None  # type: ignore[attr-defined]
    assert torch.equal(lesson.asked.inputs[1], h[:20])  # type: ignore[attr-defined]
    out, state = program(x[:20], h[:20, [3, 4, 5, 6, 7]])
    wanted, held = teacher(x[:20], h[:20])
    held = held[:, 3:]
    size = max(1.0, float(held.square().mean().detach()))
    close(part(found), F.mse_loss(out, wanted) + F.mse_loss(state, held) / size, **TIGHT)

    def states(outputs: Any, wanted: Any) -> Tensor:
        return (outputs[1] - wanted[1]).square().mean(1)  # both are of the units that stay

    found = teaching(program, ((x, h), None), teacher=Distillation(teacher, match=states))
    state = program(x[:20], h[:20, 3:])[1]
    close(part(found), F.mse_loss(state, teacher(x[:20], h[:20])[1][:, 3:]), **TIGHT)
    with pytest.raises(UsageError, match=r"input 'h' is float64\[2, 8\], what the data has for it float64\[20, 5\]"):
        teaching(program, ((x, h[:, 3:]), None), teacher=teacher)


class Heads(nn.Module):
    """Heads beside the main one: a large one, one that rules out what is negative, a number of no example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.side, self.ruled, self.scale = nn.Linear(8, 4), nn.Linear(8, 2), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(self.first(x))
        ruled = self.ruled(h)
        return self.last(h), 10 * self.side(h), ruled.masked_fill(x[:, :2] < 0, -torch.inf), self.scale.exp()


@pytest.mark.parametrize("labelled", [True, False])
def test_outputs_beside_the_main_one_are_learned_from_too(labelled: bool):
    program, teacher = made(1, Heads), made(0, Heads)
    x, y = examples()
    found = teaching(program, (x, y if labelled else None), teacher=teacher)
    mine, theirs = program(x[:20]), teacher(x[:20])
    main = softened(mine[0], theirs[0], 1.0) if labelled else F.mse_loss(mine[0], theirs[0])
    assert theirs[1].square().mean() > 1
    side = F.mse_loss(mine[1], theirs[1]) / theirs[1].square().mean()
    there = theirs[2].isfinite()
    assert 0 < there.sum() < there.numel()
    assert theirs[2][there].square().mean() < 1
    ruled = (mine[2] - theirs[2])[there].square().sum() / there.numel()
    close(part(found), main + side + ruled, **TIGHT)
    parameters = list(program.module().named_parameters())
    grads = torch.autograd.grad(part(found), [value for _, value in parameters], allow_unused=True)
    for (name, _), grad in zip(parameters, grads, strict=True):
        if name == "scale":
            assert grad is None
        else:
            assert grad is not None
            assert grad.isfinite().all(), name
            assert grad.abs().sum() > 0, name


class Other(nn.Module):
    """Says more in training; its third output in evaluation is no number where nothing is there."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.first, self.last, self.side, self.more = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3), more

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(self.first(x))
        y, side = self.last(h), self.side(h)
        if self.training and self.more:
            return y, side
        return y, h, side / (x[:, :1] > 0)


@pytest.mark.parametrize("more", [True, False])
def test_outputs_of_no_number_or_of_training_alone_are_left_out(more: bool):
    program, teacher = made(1, Other, more=more), made(0, Other, more=more)
    x, y = examples()
    found = teaching(program, (x, y), teacher=teacher)
    mine, theirs = program(x[:20]), teacher(x[:20])
    beside = F.mse_loss(mine[1], theirs[1]) if not more else 0.0  # of h, which tanh keeps below 1
    close(part(found), softened(mine[0], theirs[0], 1.0) + beside, **TIGHT)
    facts = finetune(program, (x, y), teacher=teacher, **SETTINGS)
    assert facts["last_loss"] < facts["first_loss"]


class Steps(nn.Module):
    """Returns the last state of its layers, whose examples are in the second dim."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(2, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(x.unflatten(1, (3, 2)))
        return self.last(y[:, -1]), state


def test_what_is_said_of_states_is_remembered_too():
    program, teacher = made(1, Steps), made(0, Steps)
    x, y = examples()
    found = teaching(program, (x, y), teacher=teacher)
    mine, theirs = program(x[:20]), teacher(x[:20])
    close(part(found), softened(mine[0], theirs[0], 1.0) + F.mse_loss(mine[1], theirs[1]), **TIGHT)
    assert finetune(program, (x, y), teacher=teacher, **SETTINGS)["distillation"]["remembered"]


# runs ----------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "ekfac"])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path, optimizer: str):
    def watch(stage: str, done: float | None) -> None:
        if done is not None and done > 0.6 and stage != "asking the teacher":
            raise Interrupted

    place = tmp_path / "run.checkpoint"
    settings = SETTINGS | {"epochs": 4, "optimizer": optimizer, "lr": 0.01}
    whole, cut = made(0, Net), made(0, Net)
    facts = kfe_fx.train(whole, examples(), teacher=made(1), temperature=2.0, **settings)
    with pytest.raises(Interrupted):
        kfe_fx.train(cut, examples(), teacher=made(1), temperature=2.0, checkpoint=place, progress=watch, **settings)
    again = made(0, Net)
    resumed = kfe_fx.train(
        again, examples(), teacher=made(1), temperature=2.0, checkpoint=place, resume=True, **settings
    )
    assert resumed["resumed"] == 2
    assert resumed | {"resumed": None} == facts
    assert same(weights(again), weights(whole))
    assert facts["distillation"]["temperature"] == 2.0
    for options, told in (
        ({"teacher": made(2), "temperature": 2.0}, "has teacher"),
        ({"teacher": made(1), "temperature": 1.0}, "has temperature 2.0, not 1.0"),
        ({"teacher": made(1), "temperature": 2.0, "distil": 0.5}, "has distil 0.9, not 0.5"),
        ({"teacher": Distillation(made(1), temperature=2.0, features=["act"])}, "has features"),
        ({}, "has teacher"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            kfe_fx.train(made(0, Net), examples(), checkpoint=place, resume=True, **options, **settings)
        assert "\n" not in str(caught.value)


def trained(optimizer: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    program, wise = made(0), made(1)
    teacher = Distillation(wise, 0.7, temperature=2.0, features={"act": 0.5})
    settings = SETTINGS | {"epochs": 3, "batch_size": 17, "optimizer": optimizer, "lr": 0.01}
    facts = kfe_fx.train(program, examples(75), teacher=teacher, **settings)
    return facts, weights(program)


def work(folder: Path) -> dict[str, Any]:
    """What each of two processes does."""
    return {name: trained(name) for name in ("adamw", "ekfac")}


@pytest.mark.xdist_group("processes")
def test_two_processes_learn_as_one(tmp_path: Path):
    both = in_two_processes(work, tmp_path)
    for name in ("adamw", "ekfac"):
        (facts, state), (shared_facts, other) = both[0][name], both[1][name]
        assert shared_facts == facts
        assert facts["processes"] == 2
        assert same(state, other)
        assert facts["epoch_losses"][-1] < facts["epoch_losses"][0]
    facts, state = trained("adamw")  # EKFAC draws labels on each rank: its curvature is another sample
    for key, value in both[0]["adamw"][1].items():
        close(value, state[key], rtol=1e-9, atol=1e-9)
    assert both[0]["adamw"][0]["epoch_losses"] == pytest.approx(facts["epoch_losses"], rel=1e-9)


@pytest.mark.parametrize("optimizer", ["ekfac", "kfac"])
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("apart", [0.0, 1e-3, 0.3])
def test_curvature_does_not_vanish_near_the_teacher(optimizer: str, loss: str, apart: float):
    """Gradients do: a curvature made of them would let steps stay long, and the network run away."""
    program, teacher = made(0), made(0)
    with torch.no_grad():
        for value in program.module().parameters():
            value += apart * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).double()
    settings = SETTINGS | {"optimizer": optimizer, "lr": None, "epochs": 10}
    facts = finetune(program, (examples(200)[0], None), loss, teacher=teacher, **settings)
    assert facts["last_loss"] < max(0.02 * facts["first_loss"], 1e-6)
    assert program.module()._observer is None


# errors --------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(x + y)


class Counts(nn.Module):
    """No output that can be learned from."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).sum(1)


def test_what_means_nothing_is_refused_in_one_line():
    x, y = examples()
    program, teacher = made(0), made(1)
    torch.manual_seed(0)
    wide = capture(nn.Linear(7, 3).double(), torch.randn(2, 7).double())
    images = capture(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double(), torch.randn(2, 2, 3).double())
    indices = capture(Tagger().double(), torch.zeros(2, 6).long())
    pinned = capture(Plain().double(), torch.randn(4, 6).double(), {})
    spoilt = made(1)
    with torch.no_grad():
        spoilt.tensor("last.bias")[0] = torch.nan
    dead = made(1)
    with torch.no_grad():
        dead.tensor("first.weight").zero_()
        dead.tensor("first.bias").zero_()
    for error, told, options in (
        (UsageError, "distil is the teacher's share of the loss, from 0 to 1, got 1.5", {"distil": 1.5}),
        (UsageError, "from 0 to 1, got -0.1", {"distil": -0.1}),
        (UsageError, "from 0 to 1, got nan", {"distil": float("nan")}),
        (UsageError, "from 0 to 1, got '1'", {"distil": "1"}),
        (UsageError, "from 0 to 1, got True", {"distil": True}),
        (UsageError, "temperature is a number above 0, got 0", {"temperature": 0}),
        (UsageError, "temperature is a number above 0, got -1.0", {"temperature": -1.0}),
        (UsageError, "temperature is a number above 0, got inf", {"temperature": float("inf")}),
        (UsageError, "temperature softens classes", {"data": (x, None), "temperature": 2.0}),
        (UsageError, "temperature softens classes", {"data": (x, torch.zeros(60, 3)), "temperature": 2.0}),
        (UsageError, "distil goes with a teacher", {"teacher": None, "distil": 0.0}),
        (UsageError, "temperature goes with a teacher", {"teacher": None, "temperature": 2.0}),
        (UsageError, "features goes with a teacher", {"teacher": None, "features": ["act"]}),
        (UsageError, "the teacher is a Plain; give a Program", {"teacher": Plain()}),
        (UsageError, "the teacher is a Distillation; give a Program", {"teacher": Distillation(Plain())}),  # type: ignore[arg-type]
        (UsageError, "distil is a field of the Distillation", {"teacher": Distillation(teacher), "distil": 0.5}),
        (UsageError, "there is no loss|does not name|no such", {"teacher": Distillation(teacher, match="nearly")}),
        (UsageError, r"the teacher reads 2 inputs \(x, y\), this network 1", {"teacher": two()}),
        (UsageError, r"input 'input' is float64\[2, 7\], what the data has for it float64\[20, 6\]", {"teacher": wide}),
        (UsageError, r"input 'input' is float64\[2, 2, 3\]", {"teacher": images}),
        (UsageError, r"input 'x' is int64\[2, 6\]", {"teacher": indices}),
        (UsageError, r"the teacher's output is \[20, 4\], this network's \[20, 3\]", {"teacher": made(1, classes=4)}),
        (UsageError, "the teacher has no floating-point output", {"teacher": made(1, Counts)}),
        (UsageError, "the teacher pins its batch at 4, here it is 20", {"teacher": pinned}),
        (BadData, "what the teacher says of the first batch is not finite", {"teacher": spoilt}),
        (BadData, "distil 0.5 leaves the rest of the loss to targets", {"data": (x, None), "distil": 0.5}),
        (BadData, "needs targets or a teacher", {"data": (x, None), "teacher": None}),
        (UsageError, "no activation is called 'layer9'; there are", {"features": ["layer9"]}),
        (UsageError, "'act' has the weight -1", {"features": {"act": -1}}),
        (UsageError, "'act' has the weight 'much'", {"features": {"act": "much"}}),
        (UsageError, "say which indices stay", {"features": {"act": (1.0, "those")}}),
        (UsageError, r"'act' is \[20, 12\] in the teacher .* no indices \[40\] in dim 1",
         {"features": {"act": (1.0, {1: [40]})}}),
        (UsageError, r"'act' is \[20, 9\] in the teacher and \[20, 12\] here",
         {"teacher": made(1, hidden=9), "features": "act"}),
        (UsageError, r"'act' is \[20, 14\] in the teacher and \[20, 12\] here; say which indices stay, as kept_f",
         {"teacher": made(1, hidden=14), "features": {"act": (1.0, list(range(11)))}}),
        (BadData, "the teacher's 'act' has the mean square 0", {"teacher": dead, "features": ["act"]}),
    ):  # fmt: skip
        given: dict[str, Any] = {"data": (x, y), "teacher": teacher} | options
        before = weights(program)
        with pytest.raises(error, match=told) as caught:
            finetune(program, **given, **SETTINGS)
        assert "\n" not in str(caught.value)
        assert same(before, weights(program))
        assert not program.module().training


def two() -> Program:
    torch.manual_seed(0)
    return capture(Two().double(), (torch.randn(2, 6).double(), torch.randn(2, 6).double()))


def test_classes_that_nothing_tells():
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    x = torch.randn(20, 4, 6).double()
    program, teacher = (made_of(seed, Sequence, x) for seed in (0, 1))
    with pytest.raises(UsageError, match=r"which dim of the output \[20, 4, 3\] has the classes"):
        finetune(program, (x, None), "cross-entropy", teacher=teacher, **SETTINGS)
    finetune(program, (x, torch.randint(0, 3, (20, 4))), teacher=teacher, **SETTINGS)
    finetune(program, (x, None), teacher=teacher, **SETTINGS)
