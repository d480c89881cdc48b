"""KTO: unpaired preference losses of single sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..loss import PreferenceLoss, PreferenceLossResult, Sequences


def _kto(logratios: Tensor, desirable: Tensor, beta: float, z: Tensor) -> Tensor:
    """KTO, https://huggingface.co/papers/2402.01306 eq. 7, with ``z`` the detached, clamped KL estimate."""
    away = torch.where(desirable, logratios - z, z - logratios)
    return torch.sigmoid(-beta * away)


def _apo_zero_unpaired(logratios: Tensor, desirable: Tensor, beta: float, z: Tensor) -> Tensor:
    """Unpaired APO-zero, https://huggingface.co/papers/2408.06266 eq. 7."""
    return torch.sigmoid(-beta * torch.where(desirable, logratios, -logratios))


#: Functions of log-ratios (s,), ``desirable`` (s,), beta and the KL estimate.
KTO_LOSSES: dict[str, Callable[[Tensor, Tensor, float, Tensor], Tensor]] = {
    "kto": _kto,
    "apo_zero_unpaired": _apo_zero_unpaired,
}


def _weighted_kto(
    sequences: Sequences, beta: float, desirable_weight: float, undesirable_weight: float, loss_type: str
) -> PreferenceLossResult:
    desirable = sequences.inputs["desirable"]
    logratios = sequences.logps - sequences.reference
    z = sequences.inputs["kl"].clamp(min=0) if loss_type == "kto" else torch.zeros_like(logratios)
    # torch.where of two numbers would round them to float32
    weights = torch.where(desirable, logratios.new_full((), desirable_weight), undesirable_weight)
    losses = weights * KTO_LOSSES[loss_type](logratios, desirable, beta, z)
    return PreferenceLossResult(losses, metrics={"rewards": beta * logratios})


def kto(*, beta: float, desirable_weight: float, undesirable_weight: float, loss_type: str) -> PreferenceLoss:
    """One of :data:`KTO_LOSSES`, weighted by class and averaged over sequences."""
    fn = partial(  # not a closure: modules can be pickled
        _weighted_kto,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
    )
    return PreferenceLoss(fn, group="sequence", needs_reference=True)
