"""Losses of tokens that a user writes: what they get, what they may return, and what is checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import logitless as ll

from ..core.test_cost import scored
from ..helpers import make_case
from .cases import BUDGETS, assert_same, every_budget, extras, gradient, ragged, stats_of

EVERY_BACKEND = True


@pytest.mark.parametrize("group", ["token", "sequence", "batch"])
@every_budget
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_loss_quadratic_in_the_entropy(group, budget, softcap):
    case = make_case(sequences=5, tokens=8, dtype=torch.float64, bias=True, head=ll.HeadSpec(softcap=softcap))
    mask = case.labels != -100
    logps, entropies = stats_of(case)

    def centre(h: Tensor, t: ll.Tokens | None) -> Tensor:
        if group == "token":
            return torch.full_like(h, 2.0)
        if t is None:
            return h.sum() / mask.sum() if group == "batch" else (h.sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
        return h.mean() if group == "batch" else t.to_tokens(t.sequence_mean(h))

    def fn(t: ll.Tokens) -> ll.PolicyLossResult:
        moved = t.entropies - centre(t.entropies, t)
        return ll.PolicyLossResult(moved.square() + 0.3 * t.logps * t.advantages, {"moved": moved})

    loss = ll.FusedLinearPolicyLoss(fn, group=group, entropy_gradient=True, aggregation="sequence-mean")
    a = torch.linspace(-1, 1, 5, dtype=torch.float64)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = loss(case.hidden, case.weight, case.labels, case.bias, case.head, advantages=a)
    moved = entropies - centre(entropies, None)
    losses = torch.where(mask, moved.square() + 0.3 * logps * a[:, None], 0)
    expected = (losses.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    right = list(torch.autograd.grad(expected, case.leaves))
    assert_same([out.loss, *gradient(out, case)], [expected, *right])
    mean = torch.where(mask, moved, 0).sum().item() / mask.sum().item()
    assert out.metrics["moved"].item() == pytest.approx(mean, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("group", ["token", "sequence", "batch"])
@pytest.mark.parametrize("coef", [0.0, 0.2])
def test_own_losses_see_what_is_given(group, coef):
    case = ragged()
    given = {**extras("grpo", case), "importance_sampling_ratio": torch.linspace(0.5, 1.5, 6, dtype=torch.float64)}
    seen = []

    def fn(t: ll.Tokens) -> Tensor:
        seen.append(t)
        return -(t.logps - t.old_logps).exp() * t.advantages * t.inputs["importance_sampling_ratio"] + t.logps - t.ref_logps

    loss = ll.FusedLinearPolicyLoss(
        fn,
        group=group,
        uses_reference=True,
        reads=["importance_sampling_ratio"],
        aggregation="fixed-length",
        max_length=7,
        entropy_coef=coef,
    )
    out = loss(case.hidden, case.weight, case.labels, bias=case.bias, **given)
    logps, entropies = stats_of(case)
    factor = (given["advantages"] * given["importance_sampling_ratio"])[:, None]
    losses = -(logps - given["old_logps"]).exp() * factor + logps - given["ref_logps"] - coef * entropies
    expected = torch.where(case.labels == -100, 0, losses).sum() / 42
    assert_same([out.loss, *gradient(out, case)], [expected, *torch.autograd.grad(expected, case.leaves)])
    assert (seen[0].offsets is None) == (group == "token")
    if group != "token":
        assert sum(len(t.lengths) for t in seen) == 6
        assert sum(int(t.lengths.sum()) for t in seen) == scored(case.labels)


def test_a_token_loss_does_not_see_sequences():
    case = make_case()
    loss = ll.FusedLinearPolicyLoss(lambda t: t.to_tokens(t.sequence_mean(t.logps)))
    with pytest.raises(ValueError, match="declare group='sequence'"):
        loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda t: 0.5, "losses of type float"),
        (lambda t: t.logps.mean(), r"losses of shape \(\)"),
        (lambda t: t.logps > 0, "losses of shape .* torch.bool"),
        (lambda t: ll.PolicyLossResult(t.logps, {"m": 1.0}), r"metrics\['m'\] of type float"),
        (lambda t: ll.PolicyLossResult(t.logps, {"m": t.logps.sum()}), r"metrics\['m'\] of shape"),
    ],
)
def test_what_a_loss_function_returns_is_checked(result, words):
    case = make_case()
    with pytest.raises((TypeError, ValueError), match=words):
        ll.FusedLinearPolicyLoss(result)(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


def test_a_loss_function_with_parameters_of_its_own_is_refused():
    scale = torch.nn.Parameter(torch.tensor(0.5))
    loss = ll.FusedLinearPolicyLoss(lambda t: scale * t.logps)
    for train in ("", "hw"):
        case = make_case(train=train)
        with pytest.raises(ValueError, match=r"uses a tensor of shape \(\) that requires a gradient"):
            loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


def test_an_entropy_without_a_declared_gradient_has_none():
    """``uses_entropy`` alone: a weight, as it were."""
    case = make_case(dtype=torch.float64)
    loss = ll.FusedLinearPolicyLoss(lambda t: -t.entropies * t.logps, uses_entropy=True)
    with pytest.raises(ValueError, match="declare entropy_gradient"):
        loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))
    loss = ll.FusedLinearPolicyLoss(lambda t: -t.entropies.detach() * t.logps, uses_entropy=True)
    out = loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))
    logps, entropies = stats_of(case)
    expected = -(entropies.detach() * logps).sum() / scored(case.labels)
    assert_same([out.loss, *gradient(out, case)], [expected, *torch.autograd.grad(expected, case.leaves)])


def test_a_bonus_mask_leaves_tokens_out_of_the_bonus():
    case = make_case(dtype=torch.float64)

    def fn(t: ll.Tokens) -> ll.PolicyLossResult:
        return ll.PolicyLossResult(-t.logps, bonus_mask=t.advantages > 0)

    a = torch.tensor([1.0, -1.0, 2.0, -2.0])
    out = ll.FusedLinearPolicyLoss(fn, entropy_coef=0.5)(case.hidden, case.weight, case.labels, advantages=a)
    logps, entropies = stats_of(case)
    expected = -(logps.sum() + 0.5 * (entropies * (a > 0)[:, None]).sum()) / scored(case.labels)
    assert_same([out.loss, *gradient(out, case)], [expected, *torch.autograd.grad(expected, case.leaves)])


def test_losses_that_are_detached_are_an_error():
    case = make_case(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"do not depend on tokens\.logps"):
        ll.FusedLinearPolicyLoss(lambda t: t.advantages)(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


def test_an_undeclared_gradient_of_the_entropy_is_seen_beside_a_bonus():
    case = make_case(dtype=torch.float64)
    loss = ll.FusedLinearPolicyLoss(lambda t: -t.logps * t.entropies, uses_entropy=True, entropy_coef=0.1)
    with pytest.raises(ValueError, match="declare entropy_gradient"):
        loss(case.hidden, case.weight, case.labels, advantages=torch.ones(4))


def test_what_a_loss_function_returns_for_parts_of_a_batch_fits_together():
    case = make_case()
    given = {"advantages": torch.ones(4)}
    calls: list[int] = []

    def moody(t: ll.Tokens) -> ll.PolicyLossResult:
        calls.append(1)
        return ll.PolicyLossResult(-t.logps, {"first": t.logps} if len(calls) == 1 else {})

    with ll.settings(memory_budget=1), pytest.raises(ValueError, match="other metrics for one part"):
        ll.FusedLinearPolicyLoss(moody)(case.hidden, case.weight, case.labels, **given)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(()), [True]):
        wrong = ll.FusedLinearPolicyLoss(lambda t, mask=mask: ll.PolicyLossResult(-t.logps, bonus_mask=mask), entropy_coef=0.1)
        with pytest.raises(ValueError, match="bonus_mask"):
            wrong(case.hidden, case.weight, case.labels, **given)
