"""Metrics under the names that TRL logs. The names depend on the loss alone, never on the data.

What the batch has none of (no scored token, no sequence of a class) is 0. TRL's trainers gather metrics over processes by
name, and average them: a name that one process lacks would make the others wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.kernels.core.process_group import sum_over_ranks

from ..results import mean_or_zero
from ..scored_tokens import ScoredTokens
from .job import PreferenceReport, Term

#: Token statistics that the metrics need.
TOKEN_STATS = frozenset({"entropy", "mean_logits", "is_top1"})


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """The mean over some of the values; 0 of none. Each (n,)."""
    kept = torch.where(where, values.to(torch.float32 if values.dtype == torch.bool else values.dtype), 0)
    return kept.sum() / where.sum().clamp(min=1)


def _token_metrics(report: PreferenceReport, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Means over the tokens of chosen and of rejected sequences, (S,) bool each."""
    is_chosen, is_rejected = (_tokens_of(report.tokens, members) for members in (chosen, rejected))
    stats = report.stats
    means = {
        "entropy": (stats["entropy"], is_chosen | is_rejected),
        "logits/chosen": (stats["mean_logits"], is_chosen),
        "logits/rejected": (stats["mean_logits"], is_rejected),
        "mean_token_accuracy": (stats["is_top1"], is_chosen),
    }
    if report.group is None:
        return {name: _mean_where(values, where) for name, (values, where) in means.items()}
    wide = report.results[0].losses.dtype
    own = [(torch.where(where, values.to(wide), 0).sum(), where.sum().to(wide)) for values, where in means.values()]
    sums, counts = sum_over_ranks(torch.stack([torch.stack(pair) for pair in own], dim=1), report.group)
    return dict(zip(means, sums / counts.clamp(min=1), strict=True))


def _tokens_of(tokens: ScoredTokens, members: Tensor) -> Tensor:
    """Which counted tokens belong to the members, (S,) bool. (N,) bool."""
    found = members[tokens.sequences]
    return found if tokens.counted is None else found & tokens.counted


def pair_metrics(report: PreferenceReport, term: Term, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Metrics of a loss over pairs or, without those of pairs, of a user's own loss over single sequences.

    Args:
        chosen, rejected: (P,) the log-probabilities to log.
    """
    result, half = report.results[0], term.num_units
    is_chosen = torch.arange(len(report.logps), device=report.logps.device) < half
    metrics = _token_metrics(report, is_chosen, ~is_chosen)
    if term.loss.group == "sequence":
        del metrics["logits/chosen"], metrics["logits/rejected"]
    else:
        metrics["logps/chosen"], metrics["logps/rejected"] = mean_or_zero(chosen), mean_or_zero(rejected)
    if result.chosen_rewards is not None and result.rejected_rewards is not None:
        margins = result.chosen_rewards - result.rejected_rewards
        metrics["rewards/chosen"] = mean_or_zero(result.chosen_rewards)
        metrics["rewards/rejected"] = mean_or_zero(result.rejected_rewards)
        metrics["rewards/accuracies"] = mean_or_zero((margins > 0).double())
        metrics["rewards/margins"] = mean_or_zero(margins)
    for name, values in result.metrics.items():
        metrics[name] = mean_or_zero(values)
    return {name: value.to(report.logps.dtype) for name, value in metrics.items()}


def kto_metrics(report: PreferenceReport, term: Term, rewards: Tensor) -> dict[str, Tensor]:
    """Metrics of KTO; ``rewards`` (S,). Means over the desirable ("chosen") and the other ("rejected") sequences.

    ``rewards/margins`` is 0 unless both classes are present.
    """
    desirable = term.inputs["desirable"]
    metrics = _token_metrics(report, desirable, ~desirable)
    for name, members in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"rewards/{name}"] = _mean_where(rewards, members)
        metrics[f"logps/{name}"] = _mean_where(report.logps, members)
    both = desirable.any() & ~desirable.all()
    metrics["rewards/margins"] = torch.where(both, metrics["rewards/chosen"] - metrics["rewards/rejected"], 0)
    if "kl" in term.inputs:
        metrics["kl"] = term.inputs["kl"].clamp(min=0)
    return {name: value.to(report.logps.dtype) for name, value in metrics.items()}
