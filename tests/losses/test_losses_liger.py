"""Each loss agrees with Liger 0.8.5's ``chunked_loss`` (``compiled=False``, float32): value, all gradients, what it returns.

Where Liger means something else or is not finite, a test named after the difference shows it, and how to get Liger's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll

from ..helpers import Case, make_case, relative_error

EVERY_BACKEND = True

liger = pytest.importorskip("liger_kernel.chunked_loss")

ROUND = 2.0**-23  # distance from 1 to the next float32
PAIRS = 3
IGNORE = -100


@pytest.fixture(params=["no bias", "bias"])
def case(request) -> Case:
    """Three pairs of ragged sequences, masked inside and at the end."""
    return ragged(bias=request.param == "bias")


def ragged(**options: Any) -> Case:
    case = make_case(**{"sequences": 2 * PAIRS, "tokens": 11, "scale": 0.5, "masked": 0.2, "seed": 3} | options)
    for s, length in enumerate((11, 5, 9, 2, 11, 7)[: len(case.labels)]):
        case.labels[s, length:] = IGNORE
    assert ((case.labels != IGNORE).sum(-1) > 0).all()
    return case


def reference(bias: bool = True, sequences: int = 2 * PAIRS) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias of a reference model with another hidden size."""
    other = make_case(sequences=sequences, tokens=11, hidden=24, bias=bias, seed=9, scale=0.4, train="")
    return other.hidden, other.weight, other.bias


def largest_logp(case: Case) -> float:
    return max(1.0, ll.sequence_logps(case.hidden, case.weight, case.labels, case.bias).abs().max().item())


def gradients(loss: Tensor, case: Case, scale: float = 1.0) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss * scale, case.leaves)]


def assert_same(ours: Tensor, theirs: Tensor, size: float) -> None:
    """To 4 roundings of numbers of that size."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=4 * ROUND * max(1.0, size))


def assert_same_gradients(ours: list[Tensor], theirs: list[Tensor], size: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        assert relative_error(a, b) <= 16 * ROUND * max(1.0, size)


def compare(
    case: Case,
    ours: Callable[[], Any],
    theirs: Callable[[], tuple[Tensor, tuple[Tensor, ...]]],
    beta: float,
    means: bool = False,
) -> tuple[Any, tuple[Tensor, ...]]:
    """Loss, gradients (also scaled), log-probabilities and rewards of a pair loss."""
    out, (loss, (chosen, rejected, _, _, _, chosen_rewards, rejected_rewards, *_)) = ours(), theirs()
    returned = theirs()[1]
    logp = largest_logp(case)
    assert_same(out.loss, loss, abs(loss.item()) * max(1.0, beta * logp))
    for scale in (1.0, -0.37):
        assert_same_gradients(gradients(ours().loss, case, scale), gradients(theirs()[0], case, scale), beta * logp)
    if hasattr(out, "chosen_logps"):
        size = logp if not means else 10.0
        assert_same(out.chosen_logps, chosen, size)
        assert_same(out.rejected_logps, rejected, size)
        assert_same(out.chosen_rewards, chosen_rewards, beta * logp)
        assert_same(out.rejected_rewards, rejected_rewards, beta * logp)
    return out, returned


def token_means(labels: Tensor) -> Tensor:
    """Token weights that make a sequence's sum its mean."""
    lengths = (labels != IGNORE).sum(-1, keepdim=True)
    return (1.0 / lengths).expand(labels.shape)


# DPO

DPO_TYPES = sorted(liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2}


@pytest.mark.parametrize("name", DPO_TYPES)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_dpo_loss_types_agree_with_liger(case, name, chunk_size):
    x, w, b = reference(case.bias is not None)
    options = {"beta": 0.3, "loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0)}
    module = ll.FusedLinearDPOLoss(**options)
    peer = liger.LigerFusedLinearDPOLoss(compiled=False, chunk_size=chunk_size, **options)
    compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, case.bias, ref_hidden=x, ref_weight=w, ref_bias=b),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias, x, w, b),
        0.3,
    )


@pytest.mark.parametrize("name", DPO_TYPES)
def test_dpo_without_a_reference_agrees_with_liger(case, name):
    options = {"beta": 0.05, "loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0)}
    module = ll.FusedLinearDPOLoss(reference_free=True, **options)
    peer = liger.LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False, **options)
    compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, case.bias),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias),
        0.05,
    )


@pytest.mark.parametrize("name", DPO_TYPES)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_nll_of_ligers_dpo_is_the_loss_type_sft(case, name, alpha):
    x, w, b = reference(case.bias is not None)
    options = {"beta": 0.3, "label_smoothing": SMOOTHING.get(name, 0.0)}
    module = ll.FusedLinearDPOLoss(loss_type=[name, "sft"], loss_weights=[1.0, alpha], metrics=True, **options)
    peer = liger.LigerFusedLinearDPOLoss(compiled=False, compute_nll_loss=True, alpha=alpha, loss_type=name, **options)
    out, returned = compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, case.bias, ref_hidden=x, ref_weight=w, ref_bias=b),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias, x, w, b),
        0.3,
    )
    assert_same(out.metrics["nll_loss"], returned[4], 10.0)


@pytest.mark.parametrize("name", DPO_TYPES)
def test_ligers_average_log_prob_is_token_weights_of_one_over_length(case, name):
    x, w, b = reference(case.bias is not None)
    options = {"beta": 0.3, "loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0)}
    module = ll.FusedLinearDPOLoss(**options)
    peer = liger.LigerFusedLinearDPOLoss(compiled=False, average_log_prob=True, **options)
    compare(
        case,
        lambda: module(
            case.hidden,
            case.weight,
            case.labels,
            case.bias,
            ref_hidden=x,
            ref_weight=w,
            ref_bias=b,
            token_weights=token_means(case.labels),
        ),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias, x, w, b),
        0.3,
    )


def test_ligers_average_log_prob_of_sigmoid_is_sigmoid_norm(case):
    x, w, b = reference(case.bias is not None)
    module = ll.FusedLinearDPOLoss(beta=1.5, loss_type="sigmoid_norm")
    peer = liger.LigerFusedLinearDPOLoss(compiled=False, average_log_prob=True, beta=1.5)
    arguments = {"ref_hidden": x, "ref_weight": w, "ref_bias": b}
    out = module(case.hidden, case.weight, case.labels, case.bias, **arguments)
    loss, _ = peer(case.weight, case.hidden, case.labels, case.bias, x, w, b)
    assert_same(out.loss, loss, 10.0)
    assert_same_gradients(gradients(out.loss, case), gradients(loss, case), 10.0)


def test_liger_ignores_label_smoothing_of_sigmoid(case):
    """Liger (as TRL): plain DPO whatever ``label_smoothing`` is. Here: cDPO; 0 gives Liger's value."""
    x, w, b = reference(case.bias is not None)
    arguments = {"ref_hidden": x, "ref_weight": w, "ref_bias": b}
    loss, _ = liger.LigerFusedLinearDPOLoss(compiled=False, label_smoothing=0.3)(
        case.weight, case.hidden, case.labels, case.bias, x, w, b
    )
    plain, smoothed = (
        ll.FusedLinearDPOLoss(label_smoothing=e)(case.hidden, case.weight, case.labels, case.bias, **arguments).loss
        for e in (0.0, 0.3)
    )
    assert_same(plain, loss, 10.0)
    assert abs(smoothed - loss) > 1e-4


def test_liger_has_no_ipo():
    with pytest.raises(ValueError, match="ipo"):
        liger.LigerFusedLinearDPOLoss(loss_type="ipo")
    assert ll.FusedLinearIPOLoss().loss_type == ["ipo"]


# CPO and SimPO


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [1.0, 0.4, None])
@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
def test_cpo_agrees_with_liger(case, smoothing, alpha, average):
    module = ll.FusedLinearCPOLoss(beta=0.3, cpo_alpha=alpha or 0.0, label_smoothing=smoothing, metrics=True)
    peer = liger.LigerFusedLinearCPOLoss(
        compiled=False,
        beta=0.3,
        alpha=alpha or 1.0,
        compute_nll_loss=alpha is not None,
        label_smoothing=smoothing,
        average_log_prob=average,
    )
    weights = token_means(case.labels) if average else None
    out, returned = compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, case.bias, token_weights=weights),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias),
        0.3,
    )
    if alpha is not None:
        assert_same(out.metrics["nll_loss"], returned[4], 10.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.5), (2.0, 1.4)])
def test_simpo_without_nll_agrees_with_liger(case, smoothing, beta, gamma):
    module = ll.FusedLinearSimPOLoss(beta=beta, gamma=gamma, label_smoothing=smoothing)
    peer = liger.LigerFusedLinearSimPOLoss(
        compiled=False, beta=beta, gamma=gamma, label_smoothing=smoothing, compute_nll_loss=False
    )
    compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, case.bias),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias),
        beta,
        means=True,
    )


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_nll_of_ligers_simpo_is_a_second_objective(case, alpha):
    """Liger adds the chosen NLL to SimPO by default; the paper and TRL's ``cpo_alpha=0`` do not."""
    every = range(len(case.labels))
    objectives = {
        "simpo": ll.Objective(ll.FusedLinearSimPOLoss(beta=2.0, gamma=0.5), every),
        "nll": ll.Objective(ll.FusedLinearDPOLoss(loss_type="sft"), every, weight=alpha),
    }
    module = ll.FusedLinearMultiObjectiveLoss()
    peer = liger.LigerFusedLinearSimPOLoss(compiled=False, beta=2.0, gamma=0.5, alpha=alpha)
    out, returned = compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, objectives, case.bias),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias),
        2.0,
    )
    assert_same(out.losses["nll"].float(), returned[4], 10.0)


# ORPO


def nll_labels(case: Case) -> Tensor:
    """Labels of prompt and response: also where ``labels`` are masked, and other ones in places."""
    g = torch.Generator().manual_seed(5)
    labels = torch.randint(len(case.weight), case.labels.shape, generator=g)
    return torch.where(case.labels == IGNORE, labels, case.labels).masked_fill(labels % 7 == 0, IGNORE)


@pytest.mark.parametrize("other", [False, True], ids=["labels", "nll labels"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_orpo_agrees_with_liger(case, beta, other):
    module = ll.FusedLinearORPOLoss(beta=beta, metrics=True)
    peer = liger.LigerFusedLinearORPOLoss(compiled=False, beta=beta)
    labels = nll_labels(case) if other else None
    out, returned = compare(
        case,
        lambda: module(case.hidden, case.weight, case.labels, case.bias, nll_labels=labels),
        lambda: peer(case.weight, case.hidden, case.labels, case.bias, labels),
        beta,
        means=True,
    )
    assert_same(out.metrics["nll_loss"], returned[4], 10.0)
    assert_same(out.metrics["log_odds_ratio"], returned[7], 10.0)
    assert_same(out.metrics["log_odds_chosen"], returned[8], 10.0)


def test_orpo_without_nll_is_a_loss_of_your_own_here(case):
    """Liger's ``compute_nll_loss=False`` leaves the odds-ratio term alone."""

    def odds_ratio(pairs: ll.Pairs) -> Tensor:
        log_odds = pairs.mean_logps - torch.log(-torch.expm1(pairs.mean_logps))
        chosen, rejected = pairs.split(log_odds)
        return -0.1 * torch.nn.functional.logsigmoid(chosen - rejected)

    loss, _ = liger.LigerFusedLinearORPOLoss(compiled=False, compute_nll_loss=False)(
        case.weight, case.hidden, case.labels, case.bias
    )
    out = ll.FusedLinearPreferenceLoss(odds_ratio)(case.hidden, case.weight, case.labels, case.bias)
    assert_same(out.loss, loss, 1.0)
    assert_same_gradients(gradients(out.loss, case), gradients(loss, case), 10.0)


def test_orpo_is_finite_where_liger_is_not():
    """p = 1: Liger's ``log1p(-exp(logp))`` is infinite, and its loss not a number. Here the odds saturate."""
    w, x = torch.zeros(9, 4), torch.zeros(2, 3, 4)
    x[..., 0], w[5, 0] = 1.0, 200.0
    labels = torch.full((2, 3), 5)
    loss, _ = liger.LigerFusedLinearORPOLoss(compiled=False)(w, x, labels)
    assert torch.isnan(loss)
    w.requires_grad_()
    out = ll.FusedLinearORPOLoss()(x, w, labels)
    assert out.loss.item() == pytest.approx(0.1 * math.log(2))
    assert torch.isfinite(gradients(out.loss, Case(x, w, None, labels, ll.HeadSpec()))[0]).all()


# KTO

DESIRABLE = torch.tensor([True, False, False, True, True, False])


def compare_kto(case: Case, flags: Tensor, with_reference: bool, kl: float | None, chunk_size: int = 1) -> None:
    x, w, b = reference(case.bias is not None) if with_reference else (None, None, None)
    zeros = None if with_reference else torch.zeros(len(flags))
    module = ll.FusedLinearKTOLoss(beta=0.2)
    peer = liger.LigerFusedLinearKTOLoss(compiled=False, beta=0.2, use_ref_model=with_reference, chunk_size=chunk_size)

    def ours():
        return module(
            case.hidden,
            case.weight,
            case.labels,
            flags,
            case.bias,
            kl=0.0 if kl is None else kl,
            ref_logps=zeros,
            ref_hidden=x,
            ref_weight=w,
            ref_bias=b,
        )

    def theirs():
        estimate = None if kl is None else torch.tensor(kl)
        return peer(case.hidden, case.weight, case.labels, case.bias, flags, x, w, b, estimate)

    out, (loss, sums) = ours(), theirs()
    logp = largest_logp(case)
    assert_same(out.loss, loss, 0.2 * logp)
    for scale in (1.0, -0.37):
        assert_same_gradients(gradients(ours().loss, case, scale), gradients(theirs()[0], case, scale), 0.2 * logp)
    assert_same(out.chosen_logps.sum(), sums[0], len(flags) * logp)
    assert_same(out.rejected_logps.sum(), sums[1], len(flags) * logp)
    assert_same(out.chosen_rewards.sum(), sums[4], len(flags) * logp)
    assert_same(out.rejected_rewards.sum(), sums[5], len(flags) * logp)


@pytest.mark.parametrize("with_reference", [False, True], ids=["no reference", "reference"])
@pytest.mark.parametrize("kl", [None, 0.0, 3.0])
@pytest.mark.parametrize(
    "flags", [DESIRABLE, torch.ones_like(DESIRABLE), torch.zeros_like(DESIRABLE)], ids=["both", "desirable", "undesirable"]
)
def test_kto_agrees_with_liger(case, with_reference, kl, flags):
    compare_kto(case, flags, with_reference, kl)


def test_kto_agrees_with_liger_in_larger_chunks(case):
    compare_kto(case, DESIRABLE, True, 1.0, chunk_size=3)


def test_liger_does_not_clamp_the_kl_estimate(case):
    """Liger takes a negative estimate as it is; the paper, TRL and this library clamp it at 0."""
    x, w, b = reference(case.bias is not None)
    peer = liger.LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True)
    clamped, negative = (
        peer(case.hidden, case.weight, case.labels, case.bias, DESIRABLE, x, w, b, torch.tensor(kl))[0] for kl in (0.0, -4.0)
    )
    arguments = {"ref_hidden": x, "ref_weight": w, "ref_bias": b, "kl": -4.0}
    out = ll.FusedLinearKTOLoss()(case.hidden, case.weight, case.labels, DESIRABLE, case.bias, **arguments)
    assert_same(out.loss, clamped, 10.0)
    assert abs(negative - clamped) > 1e-4


def test_ligers_kto_has_no_class_weights(case):
    x, w, b = reference(case.bias is not None)
    arguments = {"ref_hidden": x, "ref_weight": w, "ref_bias": b, "kl": 0.5}
    parts = []
    for flag in (True, False):
        rows = flag == DESIRABLE
        peer = liger.LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True)
        kl = torch.tensor(0.5)
        parts.append(
            peer(case.hidden[rows], case.weight, case.labels[rows], case.bias, DESIRABLE[rows], x[rows], w, b, kl)[0] / 2
        )
    weighted = ll.FusedLinearKTOLoss(desirable_weight=1.5, undesirable_weight=0.5)
    out = weighted(case.hidden, case.weight, case.labels, DESIRABLE, case.bias, **arguments)
    assert_same(out.loss, 1.5 * parts[0] + 0.5 * parts[1], 10.0)


# What Liger returns besides


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo", "dpo"])
def test_a_sequence_without_tokens_has_a_mean_of_0_where_ligers_is_nan(name):
    case = ragged()
    case.labels[4] = IGNORE
    average = {"average_log_prob": True}
    peer, module, arguments = {
        "simpo": (liger.LigerFusedLinearSimPOLoss(compiled=False), ll.FusedLinearSimPOLoss(), {}),
        "orpo": (liger.LigerFusedLinearORPOLoss(compiled=False), ll.FusedLinearORPOLoss(), {}),
        "cpo": (liger.LigerFusedLinearCPOLoss(compiled=False, **average), ll.FusedLinearCPOLoss(loss_type="ipo"), {}),
        "dpo": (
            liger.LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False, **average),
            ll.FusedLinearDPOLoss(loss_type="sigmoid_norm", reference_free=True),
            {},
        ),
    }[name]
    assert torch.isnan(peer(case.weight, case.hidden, case.labels)[0])
    out = module(case.hidden, case.weight, case.labels, **arguments)
    assert torch.isfinite(out.loss)
    assert out.rejected_logps[1] == 0
    for g in gradients(out.loss, case):
        assert torch.isfinite(g).all()


def test_an_nll_over_no_tokens_is_0_where_ligers_is_nan():
    case = ragged()
    case.labels[:PAIRS] = IGNORE
    loss, returned = liger.LigerFusedLinearCPOLoss(compiled=False)(case.weight, case.hidden, case.labels)
    assert torch.isnan(loss) and torch.isnan(returned[4])
    out = ll.FusedLinearCPOLoss(metrics=True)(case.hidden, case.weight, case.labels)
    assert torch.isfinite(out.loss) and out.metrics["nll_loss"] == 0
    assert all(torch.isfinite(g).all() for g in gradients(out.loss, case))


def test_liger_averages_logits_over_masked_positions_too(case):
    """Here over scored ones; ``linear_logps`` on labels for every position gives Liger's value."""
    _, returned = liger.LigerFusedLinearSimPOLoss(compiled=False)(case.weight, case.hidden, case.labels, case.bias)
    everywhere = torch.zeros_like(case.labels)
    stats = ll.linear_logps(case.hidden, case.weight, everywhere, case.bias, outputs=("mean_logits",))
    assert_same(stats.mean_logits[:PAIRS].mean(), returned[2], 1.0)
    assert_same(stats.mean_logits[PAIRS:].mean(), returned[3], 1.0)
    out = ll.FusedLinearSimPOLoss(metrics=True)(case.hidden, case.weight, case.labels, case.bias)
    scored = ll.reference_logps(case.hidden, case.weight, case.labels, case.bias)
    expected = scored.mean_logits[:PAIRS].sum() / (case.labels[:PAIRS] != IGNORE).sum()
    assert_same(out.metrics["logits/chosen"], expected.detach(), 1.0)
    assert abs(out.metrics["logits/chosen"] - returned[2]) > 1e-4


def test_ligers_kto_sums_logits_over_positions_and_vocabulary(case):
    _, sums = liger.LigerFusedLinearKTOLoss(compiled=False)(
        case.hidden, case.weight, case.labels, case.bias, preference_labels=DESIRABLE
    )
    everywhere = torch.zeros_like(case.labels)
    stats = ll.linear_logps(case.hidden, case.weight, everywhere, case.bias, outputs=("mean_logits",))
    total = len(case.weight) * stats.mean_logits[DESIRABLE].sum()
    assert_same(total, sums[2], len(case.weight) * 11)


def test_nan_at_a_masked_position_changes_nothing_where_it_is_all_of_ligers_gradient():
    case = ragged()
    with torch.no_grad():
        case.hidden[case.labels == IGNORE] = torch.nan
    loss, _ = liger.LigerFusedLinearSimPOLoss(compiled=False)(case.weight, case.hidden, case.labels)
    assert torch.isnan(loss)
    out = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels)
    assert all(torch.isfinite(g).all() for g in gradients(out.loss, case))


def test_bf16_weight_gradients_are_not_added_up_in_bf16_as_ligers_are():
    case = make_case(sequences=48, tokens=6, hidden=32, vocab=300, dtype=torch.bfloat16, scale=0.1, masked=0.0)
    wide = case.double()
    zeros = torch.zeros(48)
    exact = gradients(ll.FusedLinearDPOLoss()(wide.hidden, wide.weight, wide.labels, ref_logps=zeros).loss, wide)[1]
    ours = gradients(ll.FusedLinearDPOLoss()(case.hidden, case.weight, case.labels, ref_logps=zeros).loss, case)[1]
    peer = liger.LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False)
    theirs = gradients(peer(case.weight, case.hidden, case.labels)[0], case)[1]
    assert relative_error(ours, exact) < 2**-7
    assert relative_error(theirs, exact) > 2 * relative_error(ours, exact)


def test_an_odd_number_of_pairs_in_chunks_agrees_with_liger():
    case = ragged()
    peer = liger.LigerFusedLinearCPOLoss(compiled=False, chunk_size=2)
    compare(
        case,
        lambda: ll.FusedLinearCPOLoss()(case.hidden, case.weight, case.labels),
        lambda: peer(case.weight, case.hidden, case.labels),
        0.1,
    )


# Liger's names over this library

swap = ll.integrations.liger
ADAPTED = {
    "dpo": ("DPO", {"beta": 0.3}),
    "dpo nll": ("DPO", {"beta": 0.3, "compute_nll_loss": True, "alpha": 0.4, "label_smoothing": 0.2}),
    "dpo average": ("DPO", {"average_log_prob": True, "beta": 1.1, "compute_nll_loss": True}),
    "dpo robust": ("DPO", {"loss_type": "robust", "label_smoothing": 0.2, "average_log_prob": True}),
    "dpo discopop": ("DPO", {"loss_type": "discopop", "discopop_tau": 0.4, "beta": 0.05}),
    "cpo": ("CPO", {}),
    "cpo average": ("CPO", {"average_log_prob": True, "label_smoothing": 0.1, "alpha": 0.3}),
    "cpo margin": ("CPO", {"compute_nll_loss": False, "beta": 0.4}),
    "simpo": ("SimPO", {}),
    "simpo margin": ("SimPO", {"compute_nll_loss": False, "gamma": 1.0, "beta": 2.0, "label_smoothing": 0.1}),
    "orpo": ("ORPO", {"beta": 0.5}),
    "orpo without nll": ("ORPO", {"compute_nll_loss": False}),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_ligers_class_names_here_return_what_ligers_do(case, name):
    """All that the tuple holds but the mean logits, which are over scored positions here, and an NLL not asked for."""
    family, options = ADAPTED[name]
    extra = reference(case.bias is not None) if family == "DPO" else ()
    if family == "ORPO" and options.get("compute_nll_loss", True):
        extra = (nll_labels(case),)
    results = []
    for module in (swap, liger):
        loss = getattr(module, f"LigerFusedLinear{family}Loss")(compiled=False, **options)
        results.append(loss(case.weight, case.hidden, case.labels, case.bias, *extra))
    (ours, mine), (theirs, its) = results
    size = options.get("beta", 0.1) * largest_logp(case)
    assert_same(ours, theirs, max(10.0, abs(theirs.item()) * size))
    assert_same_gradients(gradients(ours, case), gradients(theirs, case), size)
    assert len(mine) == len(its)
    for i, (a, b) in enumerate(zip(mine, its, strict=True)):
        if i not in (2, 3):
            assert not a.requires_grad
            assert_same(a, torch.as_tensor(b), max(10.0, largest_logp(case)))


@pytest.mark.parametrize("with_reference", [False, True], ids=["no reference", "reference"])
@pytest.mark.parametrize("kl", [None, 1.5])
def test_ligers_kto_by_its_name_here_returns_what_ligers_does(case, with_reference, kl):
    x, w, b = reference(case.bias is not None) if with_reference else (None, None, None)
    estimate = None if kl is None else torch.tensor(kl)
    results = []
    for module in (swap, liger):
        loss = module.LigerFusedLinearKTOLoss(compiled=False, use_ref_model=with_reference)
        results.append(loss(case.hidden, case.weight, case.labels, case.bias, DESIRABLE, x, w, b, estimate))
    (ours, mine), (theirs, its) = results
    assert_same(ours, theirs, 1.0)
    assert_same_gradients(gradients(ours, case), gradients(theirs, case), 0.1 * largest_logp(case))
    for i in (0, 1, 4, 5):
        assert_same(mine[i], its[i], len(DESIRABLE) * largest_logp(case))
