"""The GRPO family as pure functions of token log-probabilities. Formulas and defaults are those of TRL 1.16's GRPOTrainer.

Exponents of ratios and of k3 are bounded at 80, products of a ratio at ``exp(80)``; see :mod:`logitless.fused.bounds`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bounds import bounded, bounded_exponent
from ...rl.kl import kl_estimate
from ..loss import PolicyLoss, PolicyLossResult, Tokens
from .ppo import divergence_metrics

#: How each loss type aggregates the losses of tokens.
AGGREGATION_OF = {
    "grpo": "sequence-mean",
    "bnpo": "token-mean",
    "dr_grpo": "fixed-length",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "sapo": "sequence-mean",
    "luspo": "sequence-mean-token-sum",
    "vespo": "token-mean",
}
#: Values of ``loss_type`` of :class:`logitless.FusedLinearGRPOLoss`.
GRPO_LOSSES = tuple(AGGREGATION_OF)
#: Loss types that clip the ratio on both sides.
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELS = ("token", "sequence")
#: Bounds of VESPO's logarithms of weights and of token ratios, those of its authors.
_VESPO_LOWEST, _VESPO_LARGEST = math.log(1e-8), 20.0


@dataclass(frozen=True)
class GRPOOptions:
    """Parameters of a loss type; see :class:`logitless.FusedLinearGRPOLoss`."""

    loss_type: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    importance_sampling_level: str
    use_bias_correction_kl: bool
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float


def off_policy_mask(tokens: Tokens, threshold: float) -> Tensor:
    """Off-policy sequence masking, https://huggingface.co/papers/2512.02556 eq. 9: keeps a token whose advantage is not
    negative, or whose sequence is near the policy that sampled it. (n,) bool.
    """
    sampled = tokens.inputs.get("sampling_logps", tokens.old_logps)
    # an engine may leave a token unscored, as NaN: no evidence
    divergence = torch.nan_to_num(sampled - tokens.logps.detach(), nan=0.0)
    near = tokens.sequence_mean(divergence) <= threshold
    return (tokens.advantages >= 0) | tokens.to_tokens(near.to(tokens.logps.dtype)).bool()


def vespo_weights(tokens: Tokens, logratios: Tensor, options: GRPOOptions) -> Tensor:
    """VESPO's weight ``exp(l) w**k exp(-l w)`` of each sequence's ratio w, https://huggingface.co/papers/2602.10693. (n,)."""
    log_w = tokens.sequence_sum(logratios.detach().clamp(-_VESPO_LARGEST, _VESPO_LARGEST))
    if "sequence_importance_sampling_ratio" in tokens.inputs:
        correction = tokens.inputs["sequence_importance_sampling_ratio"].log()
        log_w = log_w + correction.clamp(_VESPO_LOWEST, _VESPO_LARGEST)
    elif "importance_sampling_ratio" in tokens.inputs:
        correction = tokens.inputs["importance_sampling_ratio"].log()
        log_w = log_w + tokens.sequence_sum(correction.clamp(_VESPO_LOWEST, _VESPO_LARGEST))
    log_w = tokens.to_tokens(log_w.clamp(_VESPO_LOWEST, _VESPO_LARGEST))
    positive = tokens.advantages >= 0
    k = _by_sign(positive, options.vespo_k_pos, options.vespo_k_neg, log_w)
    rate = _by_sign(positive, options.vespo_lambda_pos, options.vespo_lambda_neg, log_w).clamp(min=1e-4)
    weights = (rate + k * log_w - rate * log_w.exp()).exp()
    return weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def reads_sequences(options: GRPOOptions) -> bool:
    """Whether a token's loss depends on the other tokens of its sequence."""
    by_sequence = options.importance_sampling_level == "sequence" or options.loss_type == "vespo"
    return by_sequence or options.off_policy_mask_threshold is not None


def grpo(options: GRPOOptions) -> PolicyLoss:
    """See :class:`logitless.FusedLinearGRPOLoss`."""
    top_entropy = options.top_entropy_quantile < 1
    return PolicyLoss(
        functools.partial(_losses, options),
        "batch" if top_entropy else "sequence" if reads_sequences(options) else "token",
        needs_reference=options.beta != 0,
        uses_reference=options.beta != 0,
        uses_entropy=top_entropy,
        reads=("importance_sampling_ratio", *(["sampling_logps"] if options.off_policy_mask_threshold is not None else [])),
    )


def _losses(o: GRPOOptions, tokens: Tokens) -> PolicyLossResult:
    a = tokens.advantages
    logratios = tokens.logps - tokens.old_logps
    weights = logratios
    if o.importance_sampling_level == "sequence":
        weights = tokens.to_tokens(tokens.sequence_mean(logratios))
    ratios = bounded_exponent(weights).exp()
    metrics = divergence_metrics(tokens, logratios)
    kl = None
    if tokens.ref_logps is not None:
        kl = kl_estimate(tokens.logps, tokens.ref_logps, "k3")
        kl = bounded(kl * ratios) if o.use_bias_correction_kl else kl
        metrics["kl"] = kl
    if o.loss_type == "cispo":
        losses = -ratios.clamp(max=o.epsilon_high).detach() * a * tokens.logps
        metrics["cispo_clip_ratio"] = _as_number((ratios > o.epsilon_high) & (a > 0), a)
    elif o.loss_type == "sapo":
        temperature = _by_sign(a > 0, o.sapo_temperature_pos, o.sapo_temperature_neg, a)
        losses = -torch.sigmoid(temperature * (ratios - 1)) * 4 / temperature * a
    elif o.loss_type == "vespo":
        phi = vespo_weights(tokens, logratios, o)
        losses = -phi * a * tokens.logps
        metrics["vespo/phi_seq_mean"] = phi
    else:
        clamped = ratios.clamp(1 - o.epsilon_low, 1 + o.epsilon_high)
        ratios = ratios if o.delta is None else ratios.clamp(max=o.delta)
        losses = -torch.minimum(bounded(ratios * a), clamped * a)
        low, high = (ratios < 1 - o.epsilon_low) & (a < 0), (ratios > 1 + o.epsilon_high) & (a > 0)
        metrics["clip_ratio/low_mean"] = _as_number(low, a)
        metrics["clip_ratio/high_mean"] = _as_number(high, a)
        metrics["clip_ratio/region_mean"] = _as_number(low | high, a)
    if o.off_policy_mask_threshold is not None:
        kept = off_policy_mask(tokens, o.off_policy_mask_threshold)
        metrics["off_policy_kept"] = _as_number(kept, a)
        losses = losses * kept
    bonus_mask = None
    if o.top_entropy_quantile < 1:
        assert tokens.entropies is not None
        bonus_mask = tokens.entropies.detach() >= _threshold(tokens, o.top_entropy_quantile)
        losses = losses * bonus_mask
    if o.loss_type != "vespo" and "importance_sampling_ratio" in tokens.inputs:
        losses = bounded(losses * tokens.inputs["importance_sampling_ratio"])
    if kl is not None:
        losses = losses + o.beta * kl
    return PolicyLossResult(losses, metrics, bonus_mask)


def _threshold(tokens: Tokens, quantile: float) -> Tensor:
    """The entropy that the wanted share of the batch's tokens reaches."""
    if "entropy_threshold" in tokens.inputs:
        return tokens.inputs["entropy_threshold"]
    assert tokens.entropies is not None
    entropies = tokens.entropies.detach()
    return torch.quantile(entropies, 1 - quantile) if len(entropies) else entropies.new_zeros(())


def _by_sign(positive: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers, which ``torch.where`` would round to float32. (n,)."""
    return torch.where(positive, like.new_full((), yes), like.new_full((), no))


def _as_number(flags: Tensor, like: Tensor) -> Tensor:
    return flags.detach().to(like.dtype)
