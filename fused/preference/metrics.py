"""Metrics under the names that TRL logs, from what the engine collected in its one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..job import Report, Term
from ..scored_tokens import Entries


def token_outputs() -> frozenset[str]:
    """Token statistics that the metrics need."""
    return frozenset({"entropy", "mean_logits", "is_top1"})


def _token_mean(values: Tensor, where: Tensor) -> Tensor:
    kept = torch.where(where, values.to(torch.float32 if values.dtype == torch.bool else values.dtype), 0)
    return kept.sum() / where.sum().clamp(min=1)


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 of nothing."""
    return values.sum() / max(1, len(values))


def _members(entries: Entries, sequences: list[int]) -> Tensor:
    """Which counted tokens belong to these sequences. (N,) bool."""
    table = torch.zeros(max(1, len(entries.sequence_sizes)), dtype=torch.bool, device=entries.rows.device)
    table[sequences] = True
    members = table[entries.sequences]
    return members if entries.counted is None else members & entries.counted


def _token_metrics(report: Report, entries: Entries, chosen: list[int], rejected: list[int]) -> dict[str, Tensor]:
    is_chosen, is_rejected = _members(entries, chosen), _members(entries, rejected)
    tokens = report.tokens
    return {
        "entropy": _token_mean(tokens["entropy"], is_chosen | is_rejected),
        "logits/chosen": _token_mean(tokens["mean_logits"], is_chosen),
        "logits/rejected": _token_mean(tokens["mean_logits"], is_rejected),
        "mean_token_accuracy": _token_mean(tokens["is_top1"], is_chosen),
    }


def pair_metrics(report: Report, entries: Entries, term: Term, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Metrics of a pair loss; ``chosen`` and ``rejected`` (P,) are the log-probabilities to log. Of a loss of your own on
    single sequences: those that need no pairs.
    """
    result, half = report.results[0], term.num_units
    metrics = _token_metrics(report, entries, list(term.sequences[:half]), list(term.sequences[half:]))
    if term.loss.group == "sequence":
        del metrics["logits/chosen"], metrics["logits/rejected"]
    else:
        metrics["logps/chosen"], metrics["logps/rejected"] = _mean(chosen), _mean(rejected)
    if result.chosen_rewards is not None and result.rejected_rewards is not None:
        margins = result.chosen_rewards - result.rejected_rewards
        metrics["rewards/chosen"] = _mean(result.chosen_rewards)
        metrics["rewards/rejected"] = _mean(result.rejected_rewards)
        metrics["rewards/accuracies"] = _mean((margins > 0).double())
        metrics["rewards/margins"] = _mean(margins)
    for name, values in result.metrics.items():
        metrics[name] = _mean(values)
    return {name: value.to(report.logps.dtype) for name, value in metrics.items()}


def sequence_metrics(report: Report, entries: Entries, term: Term, rewards: Tensor) -> dict[str, Tensor]:
    """Metrics of KTO; ``rewards`` (S,). A class without sequences has no metrics, as in TRL."""
    desirable = term.inputs["desirable"]
    flags = desirable.tolist()
    classes = {
        "chosen": [s for s, flag in zip(term.sequences, flags, strict=True) if flag],
        "rejected": [s for s, flag in zip(term.sequences, flags, strict=True) if not flag],
    }
    metrics = _token_metrics(report, entries, classes["chosen"], classes["rejected"])
    for name, mask in (("chosen", desirable), ("rejected", ~desirable)):
        if classes[name]:
            metrics[f"rewards/{name}"] = rewards[mask].mean()
            metrics[f"logps/{name}"] = report.logps[mask].mean()
        else:
            del metrics[f"logits/{name}"]
    if classes["chosen"] and classes["rejected"]:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if "kl" in term.inputs:
        metrics["kl"] = term.inputs["kl"].clamp(min=0)
    return {name: value.to(report.logps.dtype) for name, value in metrics.items()}
