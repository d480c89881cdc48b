"""Preference losses of per-token log-probs (S, T), 0 at ignored positions, in any floating dtype; chosen sequences first."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import LossInputs

#: Constants of each loss, for every provider.
DPO_BETA = IPO_BETA = CPO_BETA = ORPO_BETA = KTO_BETA = 0.1
SIMPO_BETA, SIMPO_GAMMA, CPO_ALPHA = 2.0, 1.0, 1.0


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected."""
    half = len(values) // 2
    return values[:half], values[half:]


def _difference(values: Tensor) -> Tensor:
    chosen, rejected = halves(values)
    return chosen - rejected


def _means(logps: Tensor, inputs: LossInputs) -> Tensor:
    return logps.sum(-1) / inputs.scored.sum(-1)


def _chosen_nll(logps: Tensor, inputs: LossInputs) -> Tensor:
    return -halves(logps)[0].sum() / halves(inputs.scored)[0].sum()


def nll(logps: Tensor, inputs: LossInputs) -> Tensor:
    """Mean negative log-likelihood of the scored tokens."""
    return -logps.sum() / inputs.scored.sum()


def dpo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """https://huggingface.co/papers/2305.18290 eq. 7."""
    return -F.logsigmoid(DPO_BETA * _difference(logps.sum(-1) - inputs.ref_logps)).mean()


def ipo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """https://huggingface.co/papers/2310.12036 eq. 17, on log-ratios per token."""
    ratios = _difference(_means(logps, inputs) - inputs.ref_logps / inputs.scored.sum(-1))
    return (ratios - 1 / (2 * IPO_BETA)).square().mean()


def simpo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """https://huggingface.co/papers/2405.14734 eq. 6."""
    return -F.logsigmoid(SIMPO_BETA * _difference(_means(logps, inputs)) - SIMPO_GAMMA).mean()


def cpo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """https://huggingface.co/papers/2401.08417 eq. 5."""
    return -F.logsigmoid(CPO_BETA * _difference(logps.sum(-1))).mean() + CPO_ALPHA * _chosen_nll(logps, inputs)


def odds_ratio(means: Tensor) -> Tensor:
    """ORPO's term without its weight, https://huggingface.co/papers/2403.07691 eq. 6, of mean log-probs (S,)."""
    return -F.logsigmoid(_difference(means - torch.log(-torch.expm1(means)))).mean()


def orpo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """NLL of the chosen sequences and :func:`odds_ratio`."""
    return _chosen_nll(logps, inputs) + ORPO_BETA * odds_ratio(_means(logps, inputs))


def kto(logps: Tensor, inputs: LossInputs) -> Tensor:
    """https://huggingface.co/papers/2402.01306 eq. 8."""
    ratios = logps.sum(-1) - inputs.ref_logps - inputs.kl.clamp(min=0)
    return (1 - torch.sigmoid(KTO_BETA * torch.where(inputs.desirable, ratios, -ratios))).mean()


def upstream(logps: Tensor, inputs: LossInputs) -> Tensor:
    """A loss whose gradient at the log-probs is ``inputs.upstream``."""
    return (logps * inputs.upstream).sum()


PREFERENCE_LOSSES: dict[str, Callable[[Tensor, LossInputs], Tensor]] = {
    function.__name__: function for function in (nll, dpo, ipo, simpo, cpo, orpo, kto)
}
