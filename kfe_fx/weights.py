"""What can be wrong with the weights of a network, found before anything is made of them."""

from __future__ import annotations

import torch

from kfe_fx.errors import UsageError
from kfe_fx.program import Program


def check_weights(program: Program) -> None:
    """Refuse weights that are not finite: scores of them rank nothing, and NaN equals NaN in any proof.

    Infinities in buffers and in parameters that are not trained may be masks, so they pass; NaN never does.

    Raises:
        UsageError: a parameter or buffer has one.
    """
    module = program.module()
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    for name, value in program.state_dict().items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        wrong = ~torch.isfinite(value) if name in trained else torch.isnan(value)
        if count := int(wrong.sum()):
            raise UsageError(
                f"the weights are damaged: {count:,} of {value.numel():,} values of {name} are not finite; "
                "restore a sound checkpoint"
            )
