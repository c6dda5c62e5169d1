"""The truth about curvature: gradients of one example at a time by autograd, and what a store must say of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import Block, Blocks, Store, find_blocks, fit
from kfe_fx.program import Program, named_tensors
from kfe_fx.training.losses import Loss
from tests.random_nets import outputs

RELATIVE = 1e-9


def square(outs: Any, targets: Tensor) -> Tensor:
    """Take each example's own loss [N]: every element of every output against a pattern of its own, examples first."""
    total = torch.zeros_like(targets)
    for number, out in enumerate(outputs(outs)):
        flat = out.reshape(len(targets), -1)
        pattern = torch.linspace(-1.0, 1.0 + number, flat.shape[1], dtype=flat.dtype)
        total = total + 0.5 * (flat - targets.unsqueeze(1) * pattern).square().sum(1)
    return total


LOSS = Loss("square", square, "none")


def targets_of(count: int) -> Tensor:
    """Make a target for each example."""
    return torch.linspace(0.3, 1.7, count, dtype=torch.float64)


def examples_of(program: Program, inputs: tuple[Any, ...], start: int, stop: int) -> list[Any]:
    """Take some examples of flat inputs."""
    dims = program.example_dims()
    cut = []
    for name, value in zip(program.signature.input_names, inputs, strict=True):
        dim = dims.get(name)
        cut.append(value if dim is None else value.narrow(dim, start, stop - start))
    return cut


def gradients(program: Program, inputs: tuple[Any, ...], targets: Tensor, loss: Loss = LOSS) -> dict[str, Tensor]:
    """Return the gradient of each example's loss by each parameter, [N, *shape], one batch of one at a time."""
    module = program.module()
    parameters = dict(module.named_parameters())
    rows = []
    for n in range(len(targets)):
        outs = module.run_flat(examples_of(program, inputs, n, n + 1), "eval")
        value = loss.function(outs, targets[n : n + 1]).sum()
        rows.append(torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(parameters)}


def coupled(program: Program, inputs: tuple[Any, ...], count: int) -> bool:
    """Tell whether what comes out for an example depends on the others."""
    module = program.module()
    with torch.no_grad():
        whole = module.run_flat(list(inputs), "eval")
        alone = module.run_flat(examples_of(program, inputs, 0, 1), "eval")
    return not all(
        torch.allclose(one[:1], other, rtol=1e-9, atol=1e-9) for one, other in zip(whole, alone, strict=True)
    )


def measured(program: Program, inputs: tuple[Any, ...], targets: Tensor, **options: Any) -> Store:
    """Fit on inputs as the network takes them."""
    data = [(inputs, targets)]
    options = {"statistics": ("ekfac", "diagonal"), "loss": LOSS, "source": "empirical"} | options
    return fit(program, data, **options)


def assert_equal(found: Tensor, expected: Tensor, what: str, least: float = 1e-12) -> None:
    """Compare to 1e-9 of the largest entry, or of ``least`` where that is larger."""
    assert found.shape == expected.shape, f"{what}: {list(found.shape)}, not {list(expected.shape)}"
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, least)
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert error <= RELATIVE * scale, f"{what}: off by {error:.3g} of {scale:.3g}"


def check_claims(program: Program, blocks: Blocks, truth: dict[str, Tensor]) -> None:
    """Check that each entry of each parameter is claimed once, or has no gradient, or is named as left out."""
    named = dict(program.module().named_parameters(remove_duplicate=False))
    left = {item.parameter for item in blocks.left_out}
    canonical = dict(program.module().named_parameters())
    claims = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in canonical.items()}
    for block in blocks.blocks:
        ones = torch.ones(block.shape, dtype=torch.float64)
        fresh = {name: torch.zeros_like(claims[name]) for name in block.parameters}
        block.put(ones, fresh)
        assert torch.equal(block.matrix(fresh), ones), block.name
        for name, value in fresh.items():
            claims[name] += value
    assert left <= named.keys()
    for name, times in claims.items():
        if name in left:
            assert not times.any(), name
            continue
        assert (times <= 1).all(), f"{name} is claimed twice"
        if name in truth:
            assert not truth[name][:, times == 0].any(), f"{name} has gradients that no block claims"
    for item in blocks.left_out:
        if item.reason == "never reaches an output" and item.parameter in truth:
            assert not truth[item.parameter].any(), item
    assert len({block.name for block in blocks.blocks}) == len(blocks.blocks)


def stacked(block: Block, truth: dict[str, Tensor]) -> Tensor:
    """Gather each example's gradient as the block's matrix, [N, K, o, i]."""
    count = len(truth[block.weight])
    return torch.stack([block.matrix({name: truth[name][n] for name in block.parameters}) for n in range(count)])


def check_store(store: Store, blocks: Blocks, truth: dict[str, Tensor], basis: bool = True) -> None:
    """Check D against the truth entry by entry, and the trace of S* against that of D."""
    for block in blocks.blocks:
        expected = stacked(block, truth).square().mean(0)
        found = store.blocks[block.name]
        assert found.D is not None or not expected.any(), f"{block.name} was not measured"
        if found.D is None:
            continue
        assert_equal(found.D, expected, f"D of {block.name}")
        if block.kind == "kronecker" and basis:
            assert found.S is not None, block.name
            assert abs(float(found.S.sum() - found.D.sum())) <= RELATIVE * max(float(found.D.sum()), 1e-12), block.name
            assert_equal(found.S, rotated(store, block, truth), f"S* of {block.name}")


def rotated(store: Store, block: Block, truth: dict[str, Tensor]) -> Tensor:
    """Compute S* from the definition: mean of (U_G^T dW_n U_A)^2."""
    made = stacked(block, truth)
    basis = store.blocks[block.name].basis
    if "U_A" in basis:
        made = made @ basis["U_A"]
    if "U_G" in basis:
        made = basis["U_G"].transpose(1, 2) @ made
    return made.square().mean(0)


def check(
    module: nn.Module | Program, inputs: Any, count: int = 3, axes: Any = None, **options: Any
) -> tuple[Program, Blocks, Store]:
    """Check everything there is to check about one network in evaluation mode."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    program = module if isinstance(module, Program) else kfe_fx.capture(module, inputs, axes)
    targets = targets_of(count)
    truth = gradients(program, inputs, targets)
    blocks = find_blocks(program)
    check_claims(program, blocks, truth)
    store = measured(program, inputs, targets, blocks=blocks, **options)
    check_store(store, blocks, truth)
    return program, blocks, store


def summed(
    program: Program, blocks: Blocks, inputs: list[Any], mode: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run forward and backward once with taps and return, by block, the sum of the rows' products and the gradients.

    What a block says of its examples must add up to the gradient of the parameter, also in training mode and where
    examples see each other.
    """
    from kfe_fx.curvature.collector import Collector

    module = program.module()
    module.train(mode == "train")
    made: dict[str, Tensor] = {}

    def sink(observation: Any) -> None:
        for pairs in observation.chunks():
            left, right = pairs.dense()
            total = left.flatten(1, 2).transpose(1, 2) @ right.flatten(1, 2)
            name = observation.block.name
            made[name] = made[name] + total if name in made else total

    chosen = [block for block in blocks.blocks if block.batched.get(mode, False)]
    collector = Collector(program, blocks, chosen, sink)
    parameters = dict(module.named_parameters())
    with collector.watching():
        outs = module.run_flat(inputs, mode)
        total = sum((0.5 * out.square().sum() + out.sum() for out in outs if out.is_floating_point()), torch.zeros(()))
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
        collector.flush()
    module.eval()
    truth = dict(zip(parameters, found, strict=True))
    assert not collector.nonfinite
    return made, {block.name: block.matrix(truth) for block in chosen}


def restored(program: Program) -> dict[str, Tensor]:
    """Copy all tensors, to compare later."""
    return {name: value.detach().clone() for name, value in named_tensors(program.module()).items()}
