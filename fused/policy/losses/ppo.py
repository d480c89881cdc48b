"""PPO's clipped policy loss as a pure function of token log-probabilities. https://huggingface.co/papers/1707.06347

Exponents of ratios and of k3 are bounded at 80, products of a ratio at ``exp(80)``; see :mod:`logitless.fused.bounds`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...bounds import bounded, bounded_exponent
from ...rl.kl import KL_ESTIMATORS, kl_estimate
from ..loss import PolicyLoss, PolicyLossResult, Tokens

#: Estimators with the gradient of k2, whose expectation is that of the KL divergence; verl's names.
STRAIGHT_THROUGH = {name + "+": name for name in KL_ESTIMATORS if name != "k2"}
#: Values of ``kl_estimator``.
KL_PENALTIES = (*KL_ESTIMATORS, *STRAIGHT_THROUGH)


def kl_penalty(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """``kl_estimate``, and with a ``+`` its value with the gradient of ``"k2"``. logps, ref_logps (n,) -> (n,)."""
    if estimator not in STRAIGHT_THROUGH:
        return kl_estimate(logps, ref_logps, estimator)
    value = kl_estimate(logps, ref_logps, STRAIGHT_THROUGH[estimator])
    carrier = kl_estimate(logps, ref_logps, "k2")
    return value.detach() + (carrier - carrier.detach())


def divergence_metrics(tokens: Tokens, logratios: Tensor) -> dict[str, Tensor]:
    """The ratio, and two estimates of ``KL(old || new)``: the distance from the sampling policy, which clipping limits."""
    moved = bounded_exponent(logratios.detach())
    return {
        "ratio": moved.exp(),
        "approx_kl": -moved,
        "approx_kl_k3": kl_estimate(tokens.old_logps, tokens.logps.detach(), "k3"),
    }


def ppo(
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
) -> PolicyLoss:
    """See :class:`logitless.FusedLinearPPOLoss`."""
    fn = functools.partial(_losses, clip_low, clip_high, dual_clip, kl_coef, kl_estimator)
    reference = kl_coef != 0
    return PolicyLoss(fn, "token", reference, reference, reads=("importance_sampling_ratio",))


def _losses(
    clip_low: float, clip_high: float, dual_clip: float | None, kl_coef: float, kl_estimator: str, tokens: Tokens
) -> PolicyLossResult:
    a = tokens.advantages
    logratios = tokens.logps - tokens.old_logps
    ratios = bounded_exponent(logratios).exp()
    unclipped, clipped = bounded(-a * ratios), -a * ratios.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    beyond = (unclipped < clipped).detach()
    metrics = divergence_metrics(tokens, logratios)
    metrics["clip_fraction/low"] = (beyond & (a < 0)).to(a.dtype)
    metrics["clip_fraction/high"] = (beyond & (a > 0)).to(a.dtype)
    metrics["clip_fraction"] = beyond.to(a.dtype)
    if dual_clip is not None:
        bound = -a * dual_clip
        cut = (a < 0) & (losses > bound)
        metrics["clip_fraction/dual"] = cut.detach().to(a.dtype)
        losses = torch.where(cut, bound, losses)
    if "importance_sampling_ratio" in tokens.inputs:
        losses = bounded(losses * tokens.inputs["importance_sampling_ratio"])
    if tokens.ref_logps is not None:
        kl = kl_penalty(tokens.logps, tokens.ref_logps, kl_estimator)
        metrics["kl"] = kl.detach()
        losses = losses + kl_coef * kl
    return PolicyLossResult(losses, metrics)
