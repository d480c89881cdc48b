"""Sums of objectives, and losses that a user writes, against formulas on materialised float64 logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll

from ..helpers import relative_error
from .variants import (
    BUDGETS,
    IGNORE,
    SCHEDULES,
    SEQUENCES,
    TOKENS,
    VARIANTS,
    VOCAB,
    Seen,
    Variant,
    assert_close,
    both_logits,
    every_budget,
    gradients,
    kind_of,
    make,
    own_margin,
    plain_tokens,
    prompt_and_response,
    schedules,
)

EVERY_BACKEND = True


# Sums of objectives


@every_budget
@both_logits
@pytest.mark.parametrize("states", [False, True], ids=["ref_logps", "ref_hidden"])
def test_a_sum_of_objectives_over_overlapping_sequences_is_the_sum_of_their_losses(budget, logits, states):
    g = torch.Generator().manual_seed(2)
    weights = torch.rand(SEQUENCES, TOKENS, generator=g)
    case = make(logits, token_weights=weights)
    case.nll_labels = prompt_and_response(case.labels)
    ref_x = torch.randn(SEQUENCES, TOKENS, 12, generator=g, dtype=torch.float64)
    ref_w = torch.randn(VOCAB, 12, generator=g, dtype=torch.float64) * 0.1
    if states:
        other = replace(case, hidden=ref_x, weight=ref_w, bias=None)
        tokens = plain_tokens(other)
        case.ref_logps = (tokens * torch.where(case.labels == IGNORE, 0, weights)).sum(-1)
    chosen = {
        "sigmoid": ([0, 1, 4, 5], 0.7),
        "simpo": ([2, 1, 0, 6, 5, 4], 1.0),
        "kto weighted": ([6, 0, 3], 2.0),
        "aot": ([3, 1, 0, 7, 5, 2], 0.5),
        "cpo": ([1, 2, 6, 5], 0.3),
        "orpo": ([0, 4], -0.2),
        "mix": ([2, 3, 6, 7], 0.4),
    }
    objectives, total, values = {}, torch.zeros((), dtype=torch.float64), {}
    for name, (which, weight) in chosen.items():
        variant = VARIANTS[name]
        part = replace(
            case,
            **{
                key: getattr(case, key)[which]
                for key in ("hidden", "labels", "ref_logps", "token_weights", "nll_labels", "desirable")
            },
        )
        if variant.kto:
            part.nll_labels = None
        values[name] = variant.expected(part)
        total = total + weight * values[name]
        objectives[name] = ll.Objective(
            variant.module,
            torch.tensor(which) if weight == 1.0 else which,
            weight,
            ref_logps=part.ref_logps if variant.reference and not states else None,
            desirable=part.desirable if variant.kto else None,
            kl=case.kl if variant.kto else None,
        )
    reference = {"ref_hidden": ref_x, "ref_weight": ref_w} if states else {}
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = ll.FusedLinearMultiObjectiveLoss()(
            case.hidden,
            case.weight,
            case.labels,
            objectives,
            bias=case.bias,
            token_weights=case.token_weights,
            nll_labels=case.nll_labels,
            **reference,
        )
    assert_close(out.loss, case, total, case)
    for name, value in values.items():
        assert out.losses[name].item() == pytest.approx(value.item(), rel=1e-10)


def test_sequences_without_an_objective_are_not_scored():
    case = make()
    with torch.no_grad():
        case.hidden[[1, 2, 3, 5, 6, 7]] = torch.nan
    objective = ll.Objective(ll.FusedLinearSimPOLoss(), [0, 4])
    out = ll.FusedLinearMultiObjectiveLoss()(case.hidden, case.weight, case.labels, {"simpo": objective}, bias=case.bias)
    part = replace(case, hidden=case.hidden[[0, 4]], labels=case.labels[[0, 4]])
    assert_close(out.loss, case, VARIANTS["simpo"].expected(part), case)
    assert (out.logps[[1, 2, 3, 5, 6, 7]] == 0).all()


# Your own loss


def own_pair(pairs: ll.Pairs) -> ll.PreferenceLossResult:
    chosen, rejected = pairs.mean_logps.chunk(2)
    return ll.PreferenceLossResult(
        torch.exp(rejected - 0.5 * chosen) + 0.1 * pairs.chosen_nll(),
        chosen,
        rejected,
        {"twice": 2 * pairs.lengths.chunk(2)[0]},
    )


def own_sequence(sequences: ll.Sequences) -> Tensor:
    return (sequences.mean_logps - 0.1 * sequences.reference) ** 2 + 0.5 * sequences.token_mean_nll()


def own_batch(pairs: ll.Pairs) -> Tensor:
    """A listwise softmax: every pair's loss depends on all the others."""
    margins = 0.1 * (pairs.chosen_logps - pairs.rejected_logps)
    return -margins.log_softmax(0) * margins.sigmoid()


def whole_nll(s: Seen) -> Tensor:
    tokens = s.case.labels != IGNORE
    return -s.logps.sum() / tokens.sum()


def own_batch_formula(s: Seen) -> Tensor:
    margins = 0.1 * (s.c - s.r)
    return -(margins - margins.exp().sum().log()) / (1 + torch.exp(-margins))


OWN = {
    "pair": Variant(
        ll.FusedLinearPreferenceLoss(own_pair, uses_nll=True),
        lambda s: torch.exp(s.mr - 0.5 * s.mc) + 0.1 * s.nll,
        reference=False,
    ),
    "margin": Variant(
        ll.FusedLinearPreferenceLoss(own_margin, margin="sum"), lambda s: torch.tanh(0.05 * (s.c - s.r)) ** 2, reference=False
    ),
    "sequence": Variant(
        ll.FusedLinearPreferenceLoss(own_sequence, group="sequence", needs_reference=True, uses_nll=True),
        lambda s: (s.logps / s.lengths - 0.1 * s.ref) ** 2 + 0.5 * whole_nll(s),
    ),
    "batch": Variant(ll.FusedLinearPreferenceLoss(own_batch, group="batch"), own_batch_formula, reference=False),
}


@pytest.mark.parametrize("name", OWN)
@every_budget
@both_logits
def test_your_own_loss_equals_its_formula_in_every_schedule(name, budget, logits):
    case, variant = make(logits), OWN[name]
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case)
    assert schedules(out) == SCHEDULES[budget][kind_of(variant.module.loss)]
    assert_close(out.loss, case, variant.expected(case), case)


@every_budget
def test_metrics_of_your_own_loss_are_means_over_the_whole_batch(budget):
    case = make()
    module = ll.FusedLinearPreferenceLoss(own_pair, uses_nll=True, metrics=True)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = module(case.hidden, case.weight, case.labels, case.bias)
    counts = (case.labels != IGNORE).sum(-1)[:4].double()
    assert out.metrics["twice"].item() == 2 * counts.mean().item()
    assert out.metrics["rewards/chosen"].item() == pytest.approx(out.chosen_rewards.mean().item())


def test_a_margin_loss_may_also_report_an_nll_of_other_labels():
    """A pair larger than the budget waits for one scalar; tokens of the NLL alone must not wait with it."""

    def fn(pairs: ll.Pairs) -> ll.PreferenceLossResult:
        losses = F.softplus(0.3 * (pairs.rejected_logps - pairs.chosen_logps))
        return ll.PreferenceLossResult(losses, metrics={"nll": pairs.chosen_nll()})

    results = []
    for budget in BUDGETS.values():
        case = make()
        module = ll.FusedLinearPreferenceLoss(fn, margin="sum", uses_nll=True)
        with ll.settings(memory_budget=budget):
            out = module(case.hidden, case.weight, case.labels, case.bias, nll_labels=prompt_and_response(case.labels))
        results.append([out.loss, *gradients(out.loss, case)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(b, a) < 1e-12
