"""The losses in plain torch, as functions of per-token log-probs: what peers without a fused loss run, and the reference.

Written apart from ``logitless.fused.preference.losses`` on purpose: the check of a benchmarked result must not share its
formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Inputs

#: Constants of each loss, for every provider.
DPO_BETA = IPO_BETA = CPO_BETA = ORPO_BETA = KTO_BETA = 0.1
SIMPO_BETA, SIMPO_GAMMA, CPO_ALPHA = 2.0, 1.0, 1.0


def _sums(logps: Tensor) -> Tensor:
    return logps.sum(-1)


def _means(logps: Tensor, inputs: Inputs) -> Tensor:
    return logps.sum(-1) / inputs.scored.sum(-1)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    half = len(values) // 2
    return values[:half], values[half:]


def _chosen_nll(logps: Tensor, inputs: Inputs) -> Tensor:
    return -_halves(logps)[0].sum() / _halves(inputs.scored)[0].sum()


def nll(logps: Tensor, inputs: Inputs) -> Tensor:
    """Mean negative log-likelihood of the scored tokens."""
    return -logps.sum() / inputs.scored.sum()


def _log_ratios(values: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = _halves(values - reference)
    return chosen - rejected


def dpo(logps: Tensor, inputs: Inputs) -> Tensor:
    """https://huggingface.co/papers/2305.18290 eq. 7."""
    return -F.logsigmoid(DPO_BETA * _log_ratios(_sums(logps), inputs.ref_logps)).mean()


def ipo(logps: Tensor, inputs: Inputs) -> Tensor:
    """https://huggingface.co/papers/2310.12036 eq. 17, on log-ratios per token."""
    ratios = _log_ratios(_means(logps, inputs), inputs.ref_logps / inputs.scored.sum(-1))
    return (ratios - 1 / (2 * IPO_BETA)).square().mean()


def simpo(logps: Tensor, inputs: Inputs) -> Tensor:
    """https://huggingface.co/papers/2405.14734 eq. 6."""
    chosen, rejected = _halves(_means(logps, inputs))
    return -F.logsigmoid(SIMPO_BETA * (chosen - rejected) - SIMPO_GAMMA).mean()


def cpo(logps: Tensor, inputs: Inputs) -> Tensor:
    """https://huggingface.co/papers/2401.08417 eq. 5."""
    chosen, rejected = _halves(_sums(logps))
    return -F.logsigmoid(CPO_BETA * (chosen - rejected)).mean() + CPO_ALPHA * _chosen_nll(logps, inputs)


def orpo(logps: Tensor, inputs: Inputs) -> Tensor:
    """https://huggingface.co/papers/2403.07691 eq. 6."""
    means = _means(logps, inputs)
    chosen, rejected = _halves(means - torch.log(-torch.expm1(means)))
    return _chosen_nll(logps, inputs) - ORPO_BETA * F.logsigmoid(chosen - rejected).mean()


def kto(logps: Tensor, inputs: Inputs) -> Tensor:
    """https://huggingface.co/papers/2402.01306 eq. 8."""
    ratios = _sums(logps) - inputs.ref_logps - inputs.kl.clamp(min=0)
    return (1 - torch.sigmoid(KTO_BETA * torch.where(inputs.desirable, ratios, -ratios))).mean()


#: Functions of (S, T) log-probs, 0 at ignored positions, in any floating dtype; 0-dim.
LOSSES: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "nll": nll,
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
    "kto": kto,
}


def upstream(logps: Tensor, inputs: Inputs) -> Tensor:
    """A loss whose gradient at the log-probs is ``inputs.upstream``."""
    return (logps * inputs.upstream).sum()


def loss_of(task: str) -> Callable[[Tensor, Inputs], Tensor]:
    """The function of a case's task."""
    return upstream if task in ("logps", "tile") else LOSSES[task]
