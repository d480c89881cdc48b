"""Providers from Liger-Kernel: its fused losses.

They run without ``torch.compile``, which would recompile on every call, because Liger makes a new closure each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses import policy, preference
from .common import all_of, finish, needs, no_softcap

_WHY_NOT = all_of(needs("liger_kernel"), no_softcap)
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("DPO", {"beta": preference.DPO_BETA, "use_ref_model": False}),
    "simpo": ("SimPO", {"beta": preference.SIMPO_BETA, "gamma": preference.SIMPO_GAMMA, "compute_nll_loss": False}),
    "cpo": ("CPO", {"beta": preference.CPO_BETA, "alpha": preference.CPO_ALPHA}),
    "orpo": ("ORPO", {"beta": preference.ORPO_BETA}),
    "kto": ("KTO", {"beta": preference.KTO_BETA, "use_ref_model": False}),
}


def _module(task: str, **more: Any) -> Any:
    from liger_kernel import chunked_loss

    name, options = _OPTIONS[task]
    return getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(compiled=False, **options, **more)


@provider("liger", tasks=_OPTIONS, why_not=_WHY_NOT)
def liger(case: Case, inputs: Inputs) -> Work:
    """Liger takes no reference log-probabilities; see :class:`~..core.inputs.Inputs` for how it computes the same loss."""
    module, kto = _module(case.task), case.task == "kto"
    offset = inputs.ref_logps[0] + inputs.kl.clamp(min=0)

    def sequences(out: Any) -> Tensor:
        return torch.cat([out[1][0], out[1][1]])

    def step() -> Result:
        if kto:
            out = module(inputs.hidden, inputs.weight, inputs.labels, preference_labels=inputs.desirable, kl=offset)
            return finish(out[0], inputs)
        out = module(inputs.weight, inputs.hidden, inputs.labels)
        return finish(out[0], inputs, sequence_logps=sequences(out))

    def token_logps() -> Tensor:
        by_token = _module(case.task, chunk_size=64)  # its loss adds up over sequences of one token, many at a time
        labels = inputs.labels.reshape(-1, 1)
        with torch.no_grad():
            out = by_token(inputs.weight.detach(), inputs.hidden.detach().reshape(len(labels), 1, -1), labels)
        return sequences(out).reshape(inputs.labels.shape)

    return Work(step, None if kto else token_logps)


@provider("liger:policy", tasks={"dapo"}, why_not=_WHY_NOT)
def grpo(case: Case, inputs: Inputs) -> Work:
    """Liger's fused GRPO loss: padded sequences, one advantage each; it has no entropy and no packed form."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    epsilons = {"epsilon_low": policy.EPSILON_LOW, "epsilon_high": policy.EPSILON_HIGH}
    module = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", **epsilons)
    responses = (slice(None), slice(case.shape.prompt, None))
    labels, mask = inputs.labels[responses].clamp(min=0), inputs.scored[responses].float()
    old_logps, advantages = inputs.old_logps[responses], inputs.sequence_advantages

    def step() -> Result:
        hidden = inputs.hidden[responses]
        loss, _ = module(hidden, inputs.weight, labels, mask, advantages, old_per_token_logps=old_logps)
        return finish(loss, inputs)

    def token_logps() -> Tensor:
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        with torch.no_grad():
            values = LigerFusedLinearPPOBase.chunk_forward(inputs.hidden[responses], inputs.weight, labels)
        return torch.cat([values.new_zeros(len(values), case.shape.prompt), values], dim=1)

    return Work(step, token_logps)
