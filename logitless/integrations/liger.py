"""Liger-Kernel's ``chunked_loss`` class names and signatures over logitless. Needs no liger-kernel.

``from logitless.integrations.liger import LigerFusedLinearDPOLoss`` replaces the import from ``liger_kernel.chunked_loss``.
What comes back has Liger's structure: the loss, then a tuple of detached tensors. Differences, all of them where Liger's
value is not what its name says: mean logits are over scored positions (Liger: all, masked ones too); a sequence without scored
tokens has a mean of 0 (Liger: NaN). ``compiled`` and ``chunk_size`` only tune Liger's own implementation; the planner and
``logitless.settings(memory_budget=...)`` take their place here, so any value gives the same result.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from logitless.fused.checks import check_number
from logitless.fused.preference.base import FusedLinearPreferenceLoss, PreferenceOutput
from logitless.fused.preference.loss import Pairs, PreferenceLoss, PreferenceLossResult
from logitless.fused.preference.losses import dpo as dpo_family
from logitless.fused.preference.modules import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)

_DPO_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)


def _with_nll(loss: PreferenceLoss, alpha: float, mean: bool) -> PreferenceLoss:
    """The loss on mean log-probabilities if asked for, plus ``alpha`` times the token-mean NLL of the chosen sequences."""
    alpha = check_number("alpha", alpha, 0.0)

    def fn(pairs: Pairs) -> PreferenceLossResult:
        nll = pairs.chosen_nll()
        if mean:
            lengths = pairs.lengths.clamp(min=1)
            ref = None if pairs.ref_logps is None else pairs.ref_logps / lengths
            pairs = replace(pairs, logps=pairs.mean_logps, ref_logps=ref)
        result = loss(pairs)
        losses = result.losses + alpha * nll if alpha else result.losses
        return replace(result, losses=losses, metrics={**result.metrics, "nll_loss": nll})

    margin = loss.margin
    if margin == "sum" and mean:
        margin = "mean"
    return replace(loss, fn=fn, margin=None if alpha else margin, uses_nll=True)


class _Preference(nn.Module):
    """Calls a loss on Liger's arguments and returns Liger's tuple."""

    def __init__(self, loss: PreferenceLoss, ignore_index: int, mean_logps: bool, nll: bool) -> None:
        super().__init__()
        self.ignore_index, self.mean_logps, self.nll = ignore_index, mean_logps, nll
        self.fused = FusedLinearPreferenceLoss(
            loss.fn, margin=loss.margin, uses_nll=True, metrics=True, ignore_index=ignore_index
        )

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2P, T, H)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.call(lin_weight, _input, target, bias)

    def call(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, **arguments: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out: PreferenceOutput = self.fused(hidden, weight, target, bias, **arguments)
        lengths = (target != self.ignore_index).sum(dim=-1).clamp(min=1)
        half = len(out.chosen_logps)
        chosen, rejected = out.chosen_logps, out.rejected_logps
        if self.mean_logps:
            chosen, rejected = chosen / lengths[:half], rejected / lengths[half:]
        nll = out.metrics["nll_loss"] if self.nll else torch.zeros_like(out.loss.detach())
        extra = [out.metrics[name] for name in ("log_odds_ratio", "log_odds_chosen") if name in out.metrics]
        means = (out.metrics["logits/chosen"], out.metrics["logits/rejected"])
        return out.loss, (chosen, rejected, *means, nll, out.chosen_rewards, out.rejected_rewards, *extra)


class LigerFusedLinearDPOLoss(_Preference):
    """Liger's DPO: ``loss(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)``.

    Args:
        ignore_index, beta, alpha, compute_nll_loss, use_ref_model, average_log_prob, loss_type, label_smoothing,
            discopop_tau: as in Liger 0.8.5; like there, ``label_smoothing`` has no effect on ``"sigmoid"``.
        compiled, chunk_size: no effect on the result.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> w, x, y = torch.randn(100, 16), torch.randn(4, 6, 16), torch.randint(100, (4, 6))
        >>> loss, (chosen_logps, *_) = LigerFusedLinearDPOLoss()(w, x, y, ref_input=x, ref_weight=w)
        >>> round(loss.item(), 4), chosen_logps.shape
        (0.6931, torch.Size([2]))
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = dpo_family.DISCOPOP_TAU,
    ) -> None:
        if loss_type not in _DPO_TYPES:
            raise ValueError(f"loss_type must be one of {sorted(_DPO_TYPES)}, got {loss_type!r}")
        smoothing = label_smoothing if loss_type in ("exo_pair", "robust") else 0.0
        tau = discopop_tau if loss_type == "discopop" else dpo_family.DISCOPOP_TAU
        checked = FusedLinearDPOLoss(
            beta, loss_type, label_smoothing=smoothing, discopop_tau=tau, reference_free=not use_ref_model
        )
        loss = _with_nll(checked.loss, alpha if compute_nll_loss else 0.0, average_log_prob)
        super().__init__(loss, ignore_index, average_log_prob, compute_nll_loss)
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (2P, T, H)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("ref_input and ref_weight are needed with use_ref_model=True")
        if not self.use_ref_model and (ref_input is not None or ref_weight is not None or ref_bias is not None):
            raise ValueError("ref_input, ref_weight and ref_bias must be None with use_ref_model=False")
        return self.call(lin_weight, _input, target, bias, ref_hidden=ref_input, ref_weight=ref_weight, ref_bias=ref_bias)


class LigerFusedLinearCPOLoss(_Preference):
    """Liger's CPO: ``loss(lin_weight, _input, target, bias)``; arguments as in Liger 0.8.5."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        base = FusedLinearCPOLoss(beta, 0.0, label_smoothing=label_smoothing).loss
        loss = _with_nll(base, alpha if compute_nll_loss else 0.0, average_log_prob)
        super().__init__(loss, ignore_index, average_log_prob, compute_nll_loss)


class LigerFusedLinearSimPOLoss(_Preference):
    """Liger's SimPO: ``loss(lin_weight, _input, target, bias)``; arguments as in Liger 0.8.5, the NLL term included."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        base = FusedLinearSimPOLoss(beta, gamma, label_smoothing).loss
        super().__init__(_with_nll(base, alpha if compute_nll_loss else 0.0, False), ignore_index, True, compute_nll_loss)


class LigerFusedLinearORPOLoss(_Preference):
    """Liger's ORPO: ``loss(lin_weight, _input, target, bias, nll_target)``; arguments as in Liger 0.8.5."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        base = FusedLinearORPOLoss(beta).loss

        def fn(pairs: Pairs) -> PreferenceLossResult:
            result = base(pairs)
            return result if compute_nll_loss else replace(result, losses=result.losses - result.metrics["nll_loss"])

        super().__init__(replace(base, fn=fn), ignore_index, True, compute_nll_loss)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.call(lin_weight, _input, target, bias, nll_labels=nll_target)


class LigerFusedLinearKTOLoss(nn.Module):
    """Liger's KTO: ``loss(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl)``.

    Returns the loss and the sums over desirable and other sequences of log-probabilities, mean logits (per scored position;
    Liger: sums over positions and vocabulary) and rewards. ``kl`` is clamped at 0 from below, as in the paper and TRL.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        if average_log_prob:
            raise ValueError("average_log_prob=True is not KTO; only False is supported")
        self.use_ref_model = use_ref_model
        self.fused = FusedLinearKTOLoss(beta, metrics=True, ignore_index=ignore_index)

    def forward(
        self,
        _input: Tensor,  # (S, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (S, T)
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,  # (S,) bool
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,  # 0-dim
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if preference_labels is None:
            raise ValueError("preference_labels is needed: a bool tensor with one value per sequence")
        given = ref_input is not None or ref_weight is not None or ref_bias is not None
        if given != self.use_ref_model:
            raise ValueError("ref_input and ref_weight must be given with use_ref_model=True, and only then")
        zeros = None if given else torch.zeros(len(target), device=_input.device)
        out = self.fused(
            _input,
            lin_weight,
            target,
            preference_labels,
            bias,
            kl=0.0 if kl is None else kl,
            ref_logps=zeros,
            ref_hidden=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
        )
        means = [out.metrics[f"logits/{name}"] for name in ("chosen", "rejected")]
        sums = (out.chosen_logps.sum(), out.rejected_logps.sum(), *means, out.chosen_rewards.sum(), out.rejected_rewards.sum())
        return out.loss, sums
