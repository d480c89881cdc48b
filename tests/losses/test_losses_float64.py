"""Every loss and every variant against formulas written out in plain PyTorch on materialised float64 logits.

In float64 values and gradients of hidden states, weight and bias agree to 1e-10; in float32 and bfloat16 they lose no more than
a small multiple of what the same formulas lose in plain PyTorch, in that dtype, on the same inputs. Tests of one promise run
every variant, on random and on peaked logits, and through every schedule that the loss can have.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import logitless as ll
from logitless.kernels.core.settings import current_settings

from ..helpers import relative_error
from .variants import (
    BETA,
    BUDGETS,
    DEFERRED,
    FORWARD,
    IGNORE,
    LENGTHS,
    SCHEDULES,
    SEQUENCES,
    TOKENS,
    VARIANTS,
    VOCAB,
    WITH_NLL,
    WITH_REFERENCE,
    Inputs,
    Seen,
    Variant,
    assert_close,
    both_logits,
    every_variant,
    gradients,
    kind_of,
    make,
    plain_tokens,
    prompt_and_response,
    schedules,
    seen,
)

EVERY_BACKEND = True


@every_variant
@both_logits
@pytest.mark.parametrize("budget", BUDGETS)
def test_value_and_all_gradients_equal_the_formula_in_every_schedule(name, logits, budget):
    case, variant = make(logits), VARIANTS[name]
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case)
    assert schedules(out) == SCHEDULES[budget][kind_of(variant.module.loss)]
    assert_close(out.loss, case, variant.expected(case), case)


def test_peaked_logits_are_peaked():
    p = plain_tokens(make("peaked")).exp()[make("peaked").labels != IGNORE]
    assert ((p > 0.998) & (p < 1 - 1e-9)).sum() > 20
    assert ((p > 1e-35) & (p < 1e-20)).sum() > 5


@pytest.mark.parametrize("name", ["aot", "aot smoothed", "aot_unpaired", "aot_unpaired smoothed"])
def test_aot_sorts_policy_and_reference_apart(name):
    case = make()
    shuffled = replace(case, ref_logps=0.2 * case.ref_logps[[3, 0, 1, 2, 4, 7, 5, 6]])
    variant = VARIANTS[name]
    assert_close(variant.run(shuffled).loss, shuffled, variant.expected(shuffled), shuffled)
    unsorted = VARIANTS["sigmoid" if "smoothed" not in name else "cdpo"].expected(shuffled)
    assert abs(variant.run(shuffled).loss - unsorted) > 1e-4


def test_ipo_of_the_paper_is_of_sums():
    """``length_normalize=False``: eq. 17. The default, as TRL's and its authors', takes per-token means."""
    case = make()
    paper = ll.FusedLinearIPOLoss(beta=BETA, length_normalize=False)
    _, s = VARIANTS["ipo sums"].evaluate(case)
    by_hand = ((s.c - s.r) - (s.qc - s.qr) - 1 / (2 * BETA)) ** 2
    out = paper(case.hidden, case.weight, case.labels, case.bias, ref_logps=case.ref_logps)
    assert_close(out.loss, case, by_hand.mean(), case)
    assert abs(VARIANTS["ipo"].run(case).loss - out.loss) > 1.0


@every_variant
def test_soft_cap_scale_and_temperature_are_part_of_every_loss(name):
    case, variant = make(head=ll.HeadSpec(logit_scale=0.7, softcap=6.0, temperature=1.3)), VARIANTS[name]
    assert_close(variant.run(case).loss, case, variant.expected(case), case)


@every_variant
@pytest.mark.parametrize("train", ["", "h", "w", "b", "hw"])
def test_value_and_gradients_of_what_is_trained(name, train):
    case, variant = make("peaked", train=train), VARIANTS[name]
    out, expected = variant.run(case), variant.expected(case)
    assert out.plan.schedule == {"": "forward_only", "h": DEFERRED}.get(train, FORWARD)
    if train:
        assert_close(out.loss, case, expected, case)
    else:
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)


# float32 and bfloat16


def first_order(variant: Variant, exact_case: Inputs, plain: Seen) -> float:
    """How far plain PyTorch's errors of the statistics of all tokens can move the loss, to first order."""
    loss, exact = variant.evaluate(exact_case, attached=True)
    pairs = ((exact.tokens, plain.tokens), (exact.squares, plain.squares))
    slopes = torch.autograd.grad(loss, [e for e, _ in pairs], allow_unused=True)
    moves = [(g * (p.double() - e)).abs().sum() for g, (e, p) in zip(slopes, pairs, strict=True) if g is not None]
    return sum(m.item() for m in moves)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_variant
@both_logits
@both_dtypes
def test_loses_no_more_than_plain_pytorch(name, logits, dtype):
    assert_loses_no_more_than_plain_pytorch(VARIANTS[name], logits, dtype)


@pytest.mark.parametrize("name", ["cdpo", "ipo", "mix", "aot", "wpo", "simpo", "orpo", "kto weighted"])
@both_logits
@both_dtypes
@pytest.mark.parametrize("budget", ["a tile of 35 tokens", "a tile of 3 tokens"])
def test_loses_no_more_than_plain_pytorch_in_many_tiles(name, logits, dtype, budget):
    with ll.settings(memory_budget=BUDGETS[budget] * dtype.itemsize // 8):
        assert_loses_no_more_than_plain_pytorch(VARIANTS[name], logits, dtype)


def assert_loses_no_more_than_plain_pytorch(variant: Variant, logits: str, dtype: torch.dtype) -> None:
    """Twice plain PyTorch's error at most, and two roundings of the result; root mean square over a few batches."""
    ours_lost, plain_lost = [], []
    for seed in range(3):
        case = make(logits, seed).to(dtype)
        exact_case = case.to(torch.float64)
        plain, seen_plain = variant.evaluate(case)
        out, exact = variant.run(case), variant.expected(exact_case)
        assert (schedules(out) == [FORWARD]) == (current_settings().memory_budget > 1 << 20)
        plain_error = max(abs(plain.item() - exact.item()), first_order(variant, exact_case, seen_plain))
        assert abs(out.loss.item() - exact.item()) <= 2 * plain_error + 2.0**-24 * abs(exact.item())
        right = gradients(exact, exact_case)
        for loss, lost in ((out.loss, ours_lost), (plain, plain_lost)):
            found = gradients(loss, case)
            assert all(g.dtype == dtype for g in found)
            lost.append([relative_error(g, r) for g, r in zip(found, right, strict=True)])
    ours_lost, plain_lost = (torch.tensor(lost).square().mean(0).sqrt() for lost in (ours_lost, plain_lost))
    assert (ours_lost <= 2 * plain_lost + torch.finfo(dtype).eps).all(), (ours_lost, plain_lost)


# What a call may carry


#: Gradient-in-forward, and one with deferred scale (for a margin) or recompute in it.
two_budgets = pytest.mark.parametrize("budget", ["one tile", "a tile of 35 tokens"])


@every_variant
@pytest.mark.parametrize("budget", ["a tile of 3 tokens"])
def test_packed_equals_padded(name, budget):
    case, variant = make("peaked"), VARIANTS[name]
    lengths = [n + 1 if n else 0 for n in LENGTHS]
    x = torch.cat([case.hidden[s, :n] for s, n in enumerate(lengths)])
    labels = torch.cat([case.labels[s, :n] for s, n in enumerate(lengths)])
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.module(x, case.weight, labels, cu_seqlens=bounds, **variant.arguments(case))
    assert_close(out.loss, case, variant.expected(case), case)


@every_variant
@two_budgets
def test_token_weights_are_in_every_sum(name, budget):
    g = torch.Generator().manual_seed(7)
    weights = torch.rand(SEQUENCES, TOKENS, generator=g) * 2
    weights = weights.masked_fill(weights < 0.3, 0.0)
    case, variant = make("peaked", token_weights=weights), VARIANTS[name]
    poisoned = replace(case, token_weights=weights.masked_fill(case.labels == IGNORE, torch.nan))
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(poisoned)
    assert_close(out.loss, case, variant.expected(case), case)


@every_variant
@two_budgets
def test_a_pair_of_weight_0_is_a_pair_of_log_probability_0(name, budget):
    case, variant = make(), VARIANTS[name]
    case.token_weights = torch.ones(SEQUENCES, TOKENS).index_fill(0, torch.tensor([0, 4]), 0.0)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case)
    assert_close(out.loss, case, variant.expected(case), case)


@pytest.mark.parametrize("name", WITH_NLL)
@two_budgets
@pytest.mark.parametrize("weighted", [False, True], ids=["", "token weights"])
def test_nll_labels_are_those_of_the_nll_term_alone(name, budget, weighted):
    case, variant = make(), VARIANTS[name]
    case.nll_labels = prompt_and_response(case.labels)
    if weighted:
        case.token_weights = torch.rand(case.labels.shape).masked_fill(case.labels == IGNORE, torch.nan)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case)
    if weighted:
        case.token_weights = case.token_weights.nan_to_num(0.0)
    expected, s = variant.evaluate(case)
    assert_close(out.loss, case, expected, case)
    assert torch.allclose(out.chosen_logps * (s.nc if variant.module._mean_logps else 1), s.c, rtol=1e-12)
    plain = replace(case, nll_labels=None)
    assert abs(out.loss - variant.expected(plain)) > 1e-4


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("budget", ["a tile of 35 tokens", "a tile of 3 tokens"])
def test_ref_hidden_equals_ref_logps(name, budget):
    """The reference has another hidden size, and its ignored positions hold no numbers."""
    case, variant = make(), VARIANTS[name]
    g = torch.Generator().manual_seed(5)
    x = torch.randn(SEQUENCES, TOKENS, 24, generator=g, dtype=torch.float64)
    w, b = (torch.randn(VOCAB, n, generator=g, dtype=torch.float64) * 0.2 for n in (24, 1))
    case.token_weights = torch.rand(SEQUENCES, TOKENS, generator=g)
    other = replace(case, hidden=x, weight=w, bias=b[:, 0])
    tokens = plain_tokens(other)
    given = replace(case, ref_logps=seen(other, tokens, tokens, False, variant.ld_alpha).logps)
    x = x.masked_fill((case.labels == IGNORE)[..., None], torch.nan)
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case, ref_logps=None, ref_hidden=x, ref_weight=w, ref_bias=b[:, 0])
    assert torch.allclose(out.ref_logps, given.ref_logps, rtol=1e-12)
    assert_close(out.loss, case, variant.expected(given), case)


@pytest.mark.parametrize("name", ["mix", "ld mix", "wpo sft"])
def test_a_reference_without_numbers_where_only_the_nll_scores_changes_nothing(name):
    case, variant = make(), VARIANTS[name]
    labels = prompt_and_response(case.labels)
    found = []
    for value in (1.0, torch.nan):
        x = case.hidden.detach().masked_fill((case.labels == IGNORE)[..., None], value)
        reference = {"ref_logps": None, "ref_hidden": x, "ref_weight": 0.9 * case.weight.detach()}
        out = variant.run(case, nll_labels=labels, **reference)
        found.append([out.loss, out.ref_logps, *gradients(out.loss, case)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


EMPTY = {"a pair": [0, 4], "the chosen": [0, 1, 2, 3], "the rejected": [4, 5, 6, 7], "everything": list(range(8))}


@every_variant
@pytest.mark.parametrize("which", EMPTY)
@two_budgets
def test_empty_sequences_have_log_probability_0_and_no_gradient(name, which, budget):
    case, variant = make(), VARIANTS[name]
    case.labels[EMPTY[which]] = IGNORE
    with torch.no_grad():
        case.hidden[EMPTY[which]] = torch.nan
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case)
    found = gradients(out.loss, case)
    assert all(torch.isfinite(g).all() for g in found)
    assert (found[0][EMPTY[which]] == 0).all()
    with torch.no_grad():
        case.hidden[EMPTY[which]] = 0.0
    expected = variant.expected(case)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for ours, exact in zip(found, gradients(expected, case), strict=True):
        assert relative_error(ours, exact) <= 1e-10


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.kto])
@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("kl", [2.5, -3.0])
def test_kto_with_one_class_absent(name, desirable, kl):
    case, variant = make(desirable=torch.full((SEQUENCES,), desirable), kl=kl), VARIANTS[name]
    out = variant.run(case)
    assert_close(out.loss, case, variant.expected(case), case)
    absent = (out.rejected_rewards, out.rejected_logps) if desirable else (out.chosen_rewards, out.chosen_logps)
    assert all(len(t) == 0 for t in absent)


def test_kl_is_detached():
    case, variant = make(), VARIANTS["kto"]
    kl = torch.tensor(case.kl, dtype=torch.float64, requires_grad=True)
    out = variant.run(case, kl=kl)
    out.loss.backward()
    assert kl.grad is None
    assert out.loss.item() == pytest.approx(variant.expected(case).item(), rel=1e-12)


# What comes back


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if not v.kto])
@pytest.mark.parametrize("budget", ["a tile of 35 tokens", "a tile of 3 tokens"])
def test_log_probabilities_and_rewards_come_back_in_the_callers_order(name, budget):
    case, variant = make(), VARIANTS[name]
    with ll.settings(memory_budget=BUDGETS[budget]):
        out = variant.run(case)
    _, s = variant.evaluate(case)
    mean = variant.module._mean_logps
    for ours, exact in ((out.chosen_logps, s.mc if mean else s.c), (out.rejected_logps, s.mr if mean else s.r)):
        assert not ours.requires_grad
        assert torch.allclose(ours, exact.detach(), rtol=1e-12)
    if variant.reference or name == "reference free":
        beta = variant.module.beta
        assert torch.allclose(out.chosen_rewards, beta * s.rc.detach(), rtol=1e-10)
        assert torch.allclose(out.rejected_rewards, beta * s.rr.detach(), rtol=1e-10)
    assert out.metrics == {}
