"""One frozen row: total variance over the rows that batches reached, measured again or not, then fine-tuned."""

from __future__ import annotations

import pytest
import torch

from kfe_fx.errors import UsageError
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.finalise_recurrent import FinaliseRecurrent
from kfe_fx.program import Program
from tests.passes.recurrent_nets import NETS, STEPS, batches, calls, data, difference, draw, moved, program

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def normalised(name: str, **options: object) -> Program:
    return moved(BatchnormRecurrent(mode="full", **options).run(program(name)).program, name)  # type: ignore[arg-type]


def prefix(net: Program) -> str:
    return next(name for name in net.state_dict() if ".running_mean_ih" in name).rpartition(".")[0]


@pytest.mark.parametrize("name", NETS)
def test_statistics_are_one_frozen_row_in_both_graphs(name: str):
    cell_norm = "channel" if "layer.gamma_c_l0" in normalised(name, cell_norm="channel").state_dict() else "none"
    net = normalised(name, cell_norm=cell_norm)
    result = FinaliseRecurrent().run(net)
    assert result.modified
    assert set(result.facts["layers"].values()) == {STEPS}
    made = result.program
    assert made.graphs.keys() == program(name).graphs.keys()
    for mode in made.graphs:
        assert not any(call.training or call.shared or call.seen for call in calls(made, mode))
    state = made.state_dict()
    assert not any("seen" in key for key in state)
    assert all(len(value) == 1 for key, value in state.items() if "running" in key)
    learned = [key for key, _ in net.module().named_parameters()]
    assert all(torch.equal(state[key], net.tensor(key)) for key in learned)
    before = {key: value.clone() for key, value in state.items() if "running" in key}
    made.train()(*data(name)).square().sum().backward()  # fine-tuning goes on, frozen
    assert all(torch.equal(value, made.tensor(key)) for key, value in before.items())
    grads = dict(made.module().named_parameters())
    assert all(grads[key].grad is not None for key in learned)
    again = FinaliseRecurrent().run(made)
    assert not again.modified
    assert again.program is made


def test_rows_pool_by_total_variance_weighted_by_the_batches_that_reached_them():
    net = BatchnormRecurrent(mode="full", cell_norm="scalar").run(program("lstm")).program
    net.train()
    with torch.no_grad():
        for steps in (STEPS, 3, 5, 3):
            net(*data("lstm", steps=steps, seed=steps))
    seen = net.tensor("layer.seen_l0")
    assert seen.tolist() == [4, 4, 4, 2, 2, 1, 1]
    made = FinaliseRecurrent().run(net).program
    for side in ("ih", "hh"):
        weight = seen.clone()
        weight[0] = 0 if side == "hh" else weight[0]  # the state zero is no statistic
        weight = weight / weight.sum()
        rows, spreads = net.tensor(f"layer.running_mean_{side}_l0"), net.tensor(f"layer.running_var_{side}_l0")
        mean = weight @ rows
        var = weight @ (spreads + rows.square()) - mean.square()
        for part, value in (("mean", mean), ("var", var)):
            found = made.tensor(f"layer.running_{part}_{side}_l0")
            torch.testing.assert_close(found, value.unsqueeze(0), rtol=1e-12, atol=1e-12)
    expected = (seen / seen.sum()) @ net.tensor("layer.running_var_c_l0")
    torch.testing.assert_close(made.tensor("layer.running_var_c_l0")[0], expected, rtol=1e-12, atol=1e-12)


def test_of_equal_rows_the_function_is_kept():
    net = program("stack")
    calibrated = BatchnormRecurrent(data=data("stack"), mode="full", cell_norm="channel").run(net).program
    made = FinaliseRecurrent().run(calibrated).program
    assert difference(net, made, data("stack", seed=3)) < 1e-12
    untouched = BatchnormRecurrent(mode="full").run(net).program  # no batch seen: all rows count the same
    assert difference(untouched, FinaliseRecurrent().run(untouched).program, data("stack")) < 1e-12


def test_statistics_are_measured_again_over_given_data():
    net = normalised("stack", cell_norm="channel")
    examples = batches("stack", 2)
    made = FinaliseRecurrent(data=examples).run(net).program
    plain = FinaliseRecurrent().run(net).program
    assert difference(made, plain, data("stack")) > 1e-6
    # of the first layer the products do not depend on other statistics
    products = []
    for (x,), _ in examples:
        hidden = torch.nn.functional.linear(x, net.tensor("inputs.weight"), net.tensor("inputs.bias"))
        products.append(hidden @ net.tensor("layer.weight_ih_l0").t())
    steps = torch.stack(products)  # [batches, N, T, g H]
    mean, var = steps.mean(1).mean(0), steps.var(1, correction=0).mean(0)  # averages over batches, [T, g H]
    torch.testing.assert_close(made.tensor("layer.running_mean_ih_l0")[0], mean.mean(0), rtol=1e-10, atol=1e-12)
    total = (var + mean.square()).mean(0) - mean.mean(0).square()
    torch.testing.assert_close(made.tensor("layer.running_var_ih_l0")[0], total, rtol=1e-10, atol=1e-12)
    again = FinaliseRecurrent(data=examples[:1]).run(made)  # also where they are frozen already
    assert again.modified
    with pytest.raises(UsageError, match="no batches"):
        FinaliseRecurrent(data=[]).run(net)


def test_fine_tuning_brings_back_what_pooling_costs():
    torch.manual_seed(0)
    net = BatchnormRecurrent(mode="full").run(program("lstm")).program
    x = draw(64, STEPS, 3)
    target = x.cumsum(1)[..., :2].tanh()

    def trained(net: Program, steps: int, rate: float) -> float:
        optimizer = torch.optim.Adam(net.module().parameters(), rate)
        for _ in range(steps):
            loss = (net.train()(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((net.eval()(x) - target).square().mean().detach())

    before = trained(net, 150, 0.02)
    final = FinaliseRecurrent().run(net).program
    pooled = float((final(x) - target).square().mean().detach())
    after = trained(final, 100, 0.01)
    assert pooled > 1.5 * before
    assert after < 1.1 * before


def test_nothing_to_do():
    net = program("lstm")
    for each in (FinaliseRecurrent(), FinaliseRecurrent(data=data("lstm"))):
        result = each.run(net)
        assert not result.modified
        assert result.program is net
