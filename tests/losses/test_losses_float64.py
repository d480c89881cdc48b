"""Every loss and every variant against formulas written out in plain PyTorch on materialised float64 logits.

In float64 values and gradients of hidden states, weight and bias agree to 1e-10; in float32 and bfloat16 they lose no more than
a small multiple of what the same formulas lose in plain PyTorch, in that dtype, on the same inputs. Tests of one promise run
every variant, on random and on peaked logits, and through every schedule that the loss can have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from logitless.fused.preference.losses.dpo import DPO_LOSSES
from logitless.fused.preference.losses.kto import KTO_LOSSES
from logitless.fused.preference.losses.simple import CPO_LOSSES
from logitless.kernels.core.settings import current_settings

from ..helpers import relative_error

EVERY_BACKEND = True

SEQUENCES, TOKENS, HIDDEN, VOCAB = 8, 31, 16, 211
#: Scored tokens of the chosen, then the rejected sequences; the last pair lacks a rejected sequence.
LENGTHS = (30, 30, 1, 12, 30, 14, 1, 0)
IGNORE = -100
BETA = 0.3
DESIRABLE = torch.tensor([True, False, True, True, False, False, True, False])


# The inputs


@dataclass
class Inputs:
    """hidden (S, T, H), weight (V, H), bias (V,), labels (S, T); ref_logps (S,), None where none is passed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ref_logps: Tensor | None = None
    token_weights: Tensor | None = None
    nll_labels: Tensor | None = None
    desirable: Tensor = DESIRABLE
    kl: float = 0.7
    head: ll.HeadSpec = field(default_factory=ll.HeadSpec)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers as leaves of another dtype."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)

        return replace(self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=leaf(self.bias))


def make(logits: str = "random", seed: int = 0, train: str = "hwb", **others: Any) -> Inputs:
    """Ragged sequences with masked tokens inside. ``peaked``: most targets have p of about 0.999, a tenth about e^-60."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(VOCAB, (SEQUENCES, TOKENS), generator=g)
    x, w, b = normal(SEQUENCES, TOKENS, HIDDEN), normal(VOCAB, HIDDEN) * 0.5, normal(VOCAB) * 0.5
    if logits == "peaked":
        kind = torch.rand(SEQUENCES, TOKENS, generator=g)
        nats = torch.where(kind < 0.6, 28.0, torch.where(kind > 0.9, -35.0, 0.0))
        rows = w[labels]
        x = 0.3 * x + nats[..., None] * rows / rows.square().sum(-1, keepdim=True)
    masked = torch.arange(TOKENS) >= torch.tensor(LENGTHS)[:, None] + 1
    masked[:, 0] = True
    masked[0, 5] = masked[1, 9] = masked[4, 20] = True
    labels = labels.masked_fill(masked, IGNORE)
    case = Inputs(x.requires_grad_("h" in train), w.requires_grad_("w" in train), b.requires_grad_("b" in train), labels)
    with torch.no_grad():  # a reference close to the policy, so that log-ratios are of a few nats
        ref = plain_tokens(case).sum(-1) + 2 * normal(SEQUENCES)
    return replace(case, ref_logps=ref, **others)


# The reference: token log-probabilities from all logits, then formulas


def plain_tokens(case: Inputs, labels: Tensor | None = None) -> Tensor:
    """Token log-probabilities (S, T), in float32 at least; 0 where the label is ignored."""
    labels = case.labels if labels is None else labels
    scored = labels != IGNORE
    z = case.head.apply(F.linear(case.hidden[scored], case.weight, case.bias))
    z = z if z.dtype == torch.float64 else z.float()
    logps = z.log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0]
    return torch.zeros(labels.shape, dtype=z.dtype).masked_scatter(scored, logps)


@dataclass
class Seen:
    """What the formulas are of. c, r: chosen and rejected; nc, nr: scored tokens; q: the reference's; all (P,)."""

    logps: Tensor  # (S,)
    lengths: Tensor  # (S,)
    nll: Tensor  # 0-dim, token mean over the chosen ones
    ref: Tensor  # (S,)
    weights: Tensor  # (P,) WPO
    case: Inputs
    tokens: Tensor  # (S, T)
    squares: Tensor  # (S, T), log sum_v p_v^2

    @property
    def c(self) -> Tensor:
        return self.logps.chunk(2)[0]

    @property
    def r(self) -> Tensor:
        return self.logps.chunk(2)[1]

    @property
    def nc(self) -> Tensor:
        return self.lengths.chunk(2)[0]

    @property
    def nr(self) -> Tensor:
        return self.lengths.chunk(2)[1]

    @property
    def qc(self) -> Tensor:
        return self.ref.chunk(2)[0]

    @property
    def qr(self) -> Tensor:
        return self.ref.chunk(2)[1]

    @property
    def mc(self) -> Tensor:
        return self.c / self.nc

    @property
    def mr(self) -> Tensor:
        return self.r / self.nr

    @property
    def rc(self) -> Tensor:
        return self.c - self.qc

    @property
    def rr(self) -> Tensor:
        return self.r - self.qr

    @property
    def h(self) -> Tensor:
        return BETA * (self.rc - self.rr)


def seen(
    case: Inputs, tokens: Tensor, nll_tokens: Tensor, reference: bool, ld_alpha: float | None = None, attached: bool = False
) -> Seen:
    """``attached``: WPO's weights carry a gradient, as they never do in training."""
    scored = case.labels != IGNORE
    counts = scored.sum(-1)
    weights = torch.ones_like(tokens) if case.token_weights is None else case.token_weights.to(tokens.dtype)
    weights = torch.where(scored, weights, 0)
    if ld_alpha is not None:
        half = len(counts) // 2
        shared = torch.minimum(counts[:half], counts[half:]).repeat(2)
        weights = torch.where(scored.cumsum(-1) <= shared[:, None], weights, weights * ld_alpha)
    chosen = slice(0, len(counts) // 2)
    nll_labels = case.labels if case.nll_labels is None else case.nll_labels
    nll = -nll_tokens[chosen].sum() / (nll_labels[chosen] != IGNORE).sum().clamp(min=1)
    with torch.no_grad():
        z = case.head.apply(F.linear(case.hidden, case.weight, case.bias)).to(tokens.dtype)
        squares = z.softmax(-1).square().sum(-1).log().requires_grad_()
    aligned = tokens - squares if attached else (tokens - squares).detach()
    wc, wr = (torch.where(scored, aligned, 0).sum(-1) / counts.clamp(min=1)).exp().chunk(2)
    ref = torch.zeros_like(tokens[:, 0])
    if reference:
        assert case.ref_logps is not None
        ref = case.ref_logps.to(tokens.dtype)
    lengths = counts.clamp(min=1).to(tokens.dtype)
    return Seen((tokens * weights).sum(-1), lengths, nll, ref, wc * wr, case, tokens, squares)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own is a straight line beyond 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


def smoothed(h: Tensor, e: float) -> Tensor:
    return (1 - e) * softplus(-h) + e * softplus(h)


def exo(h: Tensor, e: float) -> Tensor:
    q = torch.sigmoid(h)
    return q * (-softplus(-h) - math.log(1 - e)) + (1 - q) * (-softplus(h) - math.log(e))


def discopop(h: Tensor, tau: float) -> Tensor:
    mix = torch.sigmoid(h / tau)
    return (1 - mix) * softplus(-h) + mix * torch.exp(-h)


def robust(h: Tensor, e: float) -> Tensor:
    return ((1 - e) * softplus(-h) - e * softplus(h)) / (1 - 2 * e)


def aot_margins(s: Seen) -> Tensor:
    return BETA * ((s.c - s.r).sort().values - (s.qc - s.qr).sort().values)


def divergence(logratio: Tensor, kind: str) -> Tensor:
    t = torch.exp(logratio)
    if kind == "forward_kl":
        return 1 - 1 / t
    if kind == "js_divergence":
        return torch.log(2 * t / (1 + t))
    alpha = float(kind)
    return (torch.exp(((alpha - 1) * logratio).clamp(max=80)) - 1) / (alpha - 1)  # clamped as TRL does


def log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log(-torch.expm1(mean))  # log(p / (1 - p))


def orpo_terms(s: Seen) -> Tensor:
    """The odds of a sequence without tokens, whose probability is 1, saturate at a mean log-probability of -1e-12."""
    odds = [log_odds(torch.where(n > 0, m, -1e-12)) for m, n in ((s.mc, s.c.abs()), (s.mr, s.r.abs()))]
    return s.nll + BETA * softplus(-(odds[0] - odds[1]))


def alpha_reward(x: Tensor, alpha: float) -> Tensor:
    return (1 - torch.exp(-alpha * x)) / alpha


def kto(s: Seen, weights: tuple[float, float], z: float) -> Tensor:
    r, case = s.logps - s.ref, s.case
    good, bad = 1 - torch.sigmoid(BETA * (r - z)), 1 - torch.sigmoid(BETA * (z - r))
    return torch.where(case.desirable, weights[0] * good, weights[1] * bad)


@dataclass
class Variant:
    """A module, the formula of its losses, and what it takes."""

    module: ll.FusedLinearPreferenceLoss
    formula: Callable[[Seen], Tensor]
    reference: bool = True
    kto: bool = False
    ld_alpha: float | None = None

    def arguments(self, case: Inputs) -> dict[str, Any]:
        given: dict[str, Any] = {"bias": case.bias, "head": case.head, "token_weights": case.token_weights}
        if self.reference:
            given["ref_logps"] = case.ref_logps
        if self.kto:
            given["desirable"] = case.desirable
            given["kl"] = case.kl if self.module.loss_type == "kto" else None
        else:
            given["nll_labels"] = case.nll_labels
        return given

    def run(self, case: Inputs, **changed: Any) -> Any:
        return self.module(case.hidden, case.weight, case.labels, **{**self.arguments(case), **changed})

    def evaluate(self, case: Inputs, attached: bool = False) -> tuple[Tensor, Seen]:
        """The loss by its formula, and what that is of."""
        tokens = plain_tokens(case)
        nll_tokens = tokens if case.nll_labels is None else plain_tokens(case, case.nll_labels)
        s = seen(case, tokens, nll_tokens, self.reference, self.ld_alpha, attached)
        return self.formula(s).mean(), s

    def expected(self, case: Inputs) -> Tensor:
        return self.evaluate(case)[0]


def dpo(name: str | list[str], formula: Callable[[Seen], Tensor], **options: Any) -> Variant:
    module = ll.FusedLinearDPOLoss(beta=BETA, loss_type=name, **options)
    return Variant(module, formula, module.loss.needs_reference, ld_alpha=options.get("ld_alpha"))


def divergent(name: str, kind: str, of: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Variant:
    """``of`` takes the scores of chosen and rejected."""
    arguments = {"f_divergence_type": kind}
    if kind not in ("forward_kl", "js_divergence"):
        arguments = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": float(kind)}
    return dpo(name, lambda s: of(divergence(s.rc, kind), divergence(s.rr, kind)), **arguments, **options)


def simple(module: ll.FusedLinearPreferenceLoss, formula: Callable[[Seen], Tensor]) -> Variant:
    return Variant(module, formula, reference=False)


def kto_variant(loss_type: str, weights: tuple[float, float]) -> Variant:
    module = ll.FusedLinearKTOLoss(BETA, *weights, loss_type=loss_type)
    return Variant(module, lambda s: kto(s, weights, max(0.0, s.case.kl) if loss_type == "kto" else 0.0), kto=True)


CPO, SIMPO = ll.FusedLinearCPOLoss, ll.FusedLinearSimPOLoss
VARIANTS = {
    "sigmoid": dpo("sigmoid", lambda s: softplus(-s.h)),
    "cdpo": dpo("sigmoid", lambda s: smoothed(s.h, 0.15), label_smoothing=0.15),
    "reference free": dpo("sigmoid", lambda s: softplus(-0.01 * BETA * (s.c - s.r)), reference_free=True),
    "hinge": dpo("hinge", lambda s: (1 - s.h).clamp(min=0)),
    "robust": dpo("robust", lambda s: robust(s.h, 0.2), label_smoothing=0.2),
    "exo_pair": dpo("exo_pair", lambda s: exo(s.h, 0.05), label_smoothing=0.05),
    "ipo": dpo("ipo", lambda s: (s.rc / s.nc - s.rr / s.nr - 1 / (2 * BETA)) ** 2),
    "ipo sums": dpo("ipo", lambda s: (s.rc - s.rr - 1 / (2 * BETA)) ** 2, length_normalize=False),
    "nca_pair": dpo("nca_pair", lambda s: softplus(-BETA * s.rc) + (softplus(BETA * s.rc) + softplus(BETA * s.rr)) / 2),
    "bco_pair": dpo("bco_pair", lambda s: softplus(-BETA * s.rc) + softplus(BETA * s.rr)),
    "sppo_hard": dpo("sppo_hard", lambda s: (s.rc - 1 / (2 * BETA)) ** 2 + (s.rr + 1 / (2 * BETA)) ** 2),
    "aot": dpo("aot", lambda s: softplus(-aot_margins(s))),
    "aot smoothed": dpo("aot", lambda s: smoothed(aot_margins(s), 0.1), label_smoothing=0.1),
    "aot_unpaired": dpo("aot_unpaired", lambda s: softplus(-BETA * (s.rc.sort().values - s.rr.sort().values))),
    "aot_unpaired smoothed": dpo(
        "aot_unpaired", lambda s: smoothed(BETA * (s.rc.sort().values - s.rr.sort().values), 0.1), label_smoothing=0.1
    ),
    "apo_zero": dpo("apo_zero", lambda s: 1 - torch.sigmoid(BETA * s.rc) + torch.sigmoid(BETA * s.rr)),
    "apo_down": dpo("apo_down", lambda s: torch.sigmoid(BETA * s.rc) + 1 - torch.sigmoid(s.h)),
    "discopop": dpo("discopop", lambda s: discopop(s.h, 0.05)),
    "discopop tau": dpo("discopop", lambda s: discopop(s.h, 0.6), discopop_tau=0.6),
    "sft": dpo("sft", lambda s: s.nll.expand(len(s.c))),
    "sigmoid_norm": dpo("sigmoid_norm", lambda s: softplus(-BETA * (s.rc / s.nc - s.rr / s.nr))),
    "mix": dpo(
        ["sigmoid", "bco_pair", "sft"],
        lambda s: 0.8 * softplus(-s.h) + 0.2 * (softplus(-BETA * s.rc) + softplus(BETA * s.rr)) + 0.3 * s.nll,
        loss_weights=[0.8, 0.2, 0.3],
    ),
    "margin mix": dpo(
        ["sigmoid", "hinge", "robust"],
        lambda s: 0.7 * smoothed(s.h, 0.1) - 0.1 * (1 - s.h).clamp(min=0) + 2.0 * robust(s.h, 0.1),
        loss_weights=[0.7, -0.1, 2.0],
        label_smoothing=0.1,
    ),
    "ld 0": dpo("sigmoid", lambda s: softplus(-s.h), ld_alpha=0.0),
    "ld 0.4": dpo("sigmoid", lambda s: softplus(-s.h), ld_alpha=0.4),
    "ld 1": dpo("sigmoid", lambda s: softplus(-s.h), ld_alpha=1.0),
    "ld ipo": dpo("ipo", lambda s: (s.rc / s.nc - s.rr / s.nr - 1 / (2 * BETA)) ** 2, ld_alpha=0.3),
    "ld mix": dpo(["apo_zero", "sft"], lambda s: 1 - (BETA * s.rc).sigmoid() + (BETA * s.rr).sigmoid() + s.nll, ld_alpha=0.3),
    "wpo": dpo("sigmoid", lambda s: s.weights * softplus(-s.h), use_weighting=True),
    "wpo hinge": dpo("hinge", lambda s: s.weights * (1 - s.h).clamp(min=0), use_weighting=True),
    "wpo sft": dpo(["sigmoid", "sft"], lambda s: s.weights * (softplus(-s.h) + s.nll), use_weighting=True),
    "forward_kl": divergent("sigmoid", "forward_kl", lambda c, r: softplus(-BETA * (c - r))),
    "js": divergent("sigmoid", "js_divergence", lambda c, r: softplus(-BETA * (c - r))),
    "alpha 0.5": divergent("sigmoid", "0.5", lambda c, r: softplus(-BETA * (c - r))),
    "alpha 1.7": divergent("sigmoid", "1.7", lambda c, r: softplus(-BETA * (c - r))),
    "js hinge": divergent("hinge", "js_divergence", lambda c, r: (1 - BETA * (c - r)).clamp(min=0)),
    "js robust": divergent("robust", "js_divergence", lambda c, r: robust(BETA * (c - r), 0.2), label_smoothing=0.2),
    "js exo": divergent("exo_pair", "js_divergence", lambda c, r: exo(BETA * (c - r), 0.1), label_smoothing=0.1),
    "js discopop": divergent("discopop", "js_divergence", lambda c, r: discopop(BETA * (c - r), 0.05)),
    "simpo": simple(SIMPO(), lambda s: softplus(-(2 * (s.mc - s.mr) - 1))),
    "simpo smoothed": simple(SIMPO(0.8, gamma=0.3, label_smoothing=0.1), lambda s: smoothed(0.8 * (s.mc - s.mr) - 0.3, 0.1)),
    "alphapo": simple(SIMPO(alpha=0.25), lambda s: softplus(-(2 * (alpha_reward(s.mc, 0.25) - alpha_reward(s.mr, 0.25)) - 1))),
    "cpo": simple(CPO(BETA), lambda s: softplus(-BETA * (s.c - s.r)) + s.nll),
    "cpo smoothed": simple(
        CPO(BETA, cpo_alpha=0.2, label_smoothing=0.1), lambda s: smoothed(BETA * (s.c - s.r), 0.1) + 0.2 * s.nll
    ),
    "cpo margin": simple(CPO(BETA, cpo_alpha=0.0), lambda s: softplus(-BETA * (s.c - s.r))),
    "cpo hinge": simple(CPO(BETA, loss_type="hinge"), lambda s: (1 - BETA * (s.c - s.r)).clamp(min=0) + s.nll),
    "cpo ipo": simple(CPO(BETA, loss_type="ipo"), lambda s: (s.mc - s.mr - 1 / (2 * BETA)) ** 2 + s.nll),
    "cpo alpha": simple(
        CPO(0.1, cpo_alpha=0.0, alpha=1e-3),
        lambda s: softplus(-0.1 * (alpha_reward(s.c, 1e-3) - alpha_reward(s.r, 1e-3))),
    ),
    "orpo": simple(ll.FusedLinearORPOLoss(BETA), orpo_terms),
    "kto": kto_variant("kto", (1.0, 1.0)),
    "kto weighted": kto_variant("kto", (0.7, 1.9)),
    "apo_zero_unpaired": kto_variant("apo_zero_unpaired", (1.3, 0.8)),
}
VARIANTS["reference free"].module = ll.FusedLinearDPOLoss(beta=0.01 * BETA, reference_free=True)
WITH_NLL = [n for n, v in VARIANTS.items() if v.module.loss.uses_nll]
WITH_REFERENCE = [n for n, v in VARIANTS.items() if v.reference]
WITH_MARGIN = [n for n, v in VARIANTS.items() if v.module.loss.margin]
every_variant = pytest.mark.parametrize("name", VARIANTS)
both_logits = pytest.mark.parametrize("logits", ["random", "peaked"])

BUDGETS = {"one tile": 1 << 30, "two tiles": 136_000, "a tile of 35 tokens": 80_000, "a tile of 3 tokens": 11_500}
FORWARD, DEFERRED, RECOMPUTE = "gradient_in_forward", "deferred_scale", "recompute"
#: What the planner must do with pairs of 60, 44, 12 and 2 tokens (sequences of 30, 30, 30, 14, 12, 1 and 1), in float64.
SCHEDULES = {
    "one tile": {"margin": [FORWARD], "pair": [FORWARD], "sequence": [FORWARD], "batch": [FORWARD]},
    "two tiles": {
        "margin": [FORWARD, FORWARD],
        "pair": [FORWARD, FORWARD],
        "sequence": [FORWARD, FORWARD],
        "batch": [RECOMPUTE],
    },
    "a tile of 35 tokens": {
        "margin": [DEFERRED, DEFERRED, FORWARD],
        "pair": [RECOMPUTE, FORWARD],
        "sequence": [FORWARD] * 4,
        "batch": [RECOMPUTE],
    },
    "a tile of 3 tokens": {
        "margin": [DEFERRED, RECOMPUTE, FORWARD],
        "pair": [RECOMPUTE, FORWARD],
        "sequence": [RECOMPUTE, FORWARD],
        "batch": [RECOMPUTE],
    },
}


def schedules(out: Any) -> list[str]:
    return [step.schedule for step in out.plan.steps]


def kind_of(loss: ll.PreferenceLoss) -> str:
    return "margin" if loss.margin else loss.group


def gradients(loss: Tensor, case: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.leaves, retain_graph=True))


def assert_close(loss: Tensor, case: Inputs, expected: Tensor, expected_case: Inputs, tolerance: float = 1e-10) -> None:
    """Value, and the gradient of every leaf."""
    assert loss.dtype == torch.float64
    assert abs(loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    for ours, exact in zip(gradients(loss, case), gradients(expected, expected_case), strict=True):
        assert exact.abs().max() > 0
        assert relative_error(ours, exact) <= tolerance


# float64


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


every_budget = pytest.mark.parametrize("budget", BUDGETS)
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


def prompt_and_response(labels: Tensor) -> Tensor:
    """Labels of the NLL: the response but for a few tokens, a few others' labels changed, and what is masked besides."""
    g = torch.Generator().manual_seed(11)
    other = torch.randint(VOCAB, labels.shape, generator=g)
    kind = torch.rand(labels.shape, generator=g)
    mine = torch.where((labels == IGNORE) | (kind < 0.2), other, labels)
    return mine.masked_fill(kind > 0.8, IGNORE)


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


def own_margin(pairs: ll.Pairs) -> Tensor:
    return torch.tanh(0.05 * (pairs.chosen_logps - pairs.rejected_logps)) ** 2


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


# Bad input

BAD_OPTIONS = [
    (ll.FusedLinearDPOLoss, {"beta": 0.0}, "beta"),
    (ll.FusedLinearDPOLoss, {"beta": math.nan}, "beta"),
    (ll.FusedLinearDPOLoss, {"beta": "0.1"}, "beta"),
    (ll.FusedLinearDPOLoss, {"loss_type": "dpo"}, "loss_type"),
    (ll.FusedLinearDPOLoss, {"loss_type": []}, "loss_type"),
    (ll.FusedLinearDPOLoss, {"loss_type": ["sigmoid", "kto_pair"]}, "loss_type"),
    (ll.FusedLinearDPOLoss, {"loss_weights": [1.0, 2.0]}, "loss_weights"),
    (ll.FusedLinearDPOLoss, {"loss_weights": [math.inf]}, "loss_weights"),
    (ll.FusedLinearDPOLoss, {"label_smoothing": 1.5}, "label_smoothing"),
    (ll.FusedLinearDPOLoss, {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
    (ll.FusedLinearDPOLoss, {"loss_type": "exo_pair"}, "label_smoothing"),
    (ll.FusedLinearDPOLoss, {"f_divergence_type": "kl"}, "f_divergence_type"),
    (ll.FusedLinearDPOLoss, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": None}, "f_alpha"),
    (ll.FusedLinearDPOLoss, {"ld_alpha": 1.1}, "ld_alpha"),
    (ll.FusedLinearDPOLoss, {"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau"),
    (ll.FusedLinearDPOLoss, {"ignore_index": 0.5}, "ignore_index"),
    (ll.FusedLinearDPOLoss, {"metrics": "no"}, "metrics must be a bool, got 'no'"),
    (ll.FusedLinearDPOLoss, {"loss_type": "ipo", "length_normalize": "no"}, "length_normalize must be a bool, got 'no'"),
    (ll.FusedLinearDPOLoss, {"loss_type": "aot", "use_weighting": True}, "use_weighting"),
    (ll.FusedLinearDPOLoss, {"loss_type": ["sigmoid", "aot_unpaired"], "use_weighting": True}, "use_weighting"),
    (ll.FusedLinearIPOLoss, {"beta": -1.0}, "beta"),
    (ll.FusedLinearSimPOLoss, {"beta": 0.0}, "beta"),
    (ll.FusedLinearSimPOLoss, {"gamma": None}, "gamma"),
    (ll.FusedLinearSimPOLoss, {"label_smoothing": -0.1}, "label_smoothing"),
    (ll.FusedLinearSimPOLoss, {"alpha": math.inf}, "alpha"),
    (ll.FusedLinearCPOLoss, {"loss_type": "simpo"}, "loss_type"),
    (ll.FusedLinearCPOLoss, {"beta": True}, "beta"),
    (ll.FusedLinearCPOLoss, {"cpo_alpha": -1.0}, "cpo_alpha"),
    (ll.FusedLinearCPOLoss, {"alpha": "0"}, "alpha"),
    (ll.FusedLinearORPOLoss, {"beta": -0.1}, "beta"),
    (ll.FusedLinearKTOLoss, {"beta": 0}, "beta"),
    (ll.FusedLinearKTOLoss, {"loss_type": "bco"}, "loss_type"),
    (ll.FusedLinearKTOLoss, {"desirable_weight": -1.0}, "desirable_weight"),
    (ll.FusedLinearKTOLoss, {"undesirable_weight": math.nan}, "undesirable_weight"),
]
UNUSED_OPTIONS = [
    *((ll.FusedLinearDPOLoss, {"loss_type": n, "label_smoothing": 0.1}, "label_smoothing") for n in ("hinge", "ipo", "sft")),
    (ll.FusedLinearDPOLoss, {"length_normalize": False}, "length_normalize"),
    (ll.FusedLinearDPOLoss, {"discopop_tau": 0.1}, "discopop_tau"),
    (ll.FusedLinearDPOLoss, {"f_alpha_divergence_coef": 0.2}, "f_alpha_divergence_coef"),
    (ll.FusedLinearDPOLoss, {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
    (ll.FusedLinearCPOLoss, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    (ll.FusedLinearCPOLoss, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
]


@pytest.mark.parametrize(("module", "options", "named"), BAD_OPTIONS + UNUSED_OPTIONS)
def test_a_bad_or_unused_option_is_an_error_that_names_it(module, options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        module(**options)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


FLAGS = torch.ones(SEQUENCES, dtype=torch.bool)
BAD_ARGUMENTS = [
    # what the loss does not use
    ("simpo", {"ref_logps": zeros(8)}, "ref_logps"),
    ("cpo", {"ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(VOCAB, 4)}, "ref_hidden"),
    ("orpo", {"ref_bias": zeros(VOCAB)}, "ref_bias"),
    ("sft", {"ref_logps": zeros(8)}, "ref_logps"),
    ("reference free", {"ref_logps": zeros(8)}, "ref_logps"),
    ("sigmoid", {"nll_labels": torch.zeros(8, TOKENS, dtype=torch.long)}, "nll_labels"),
    ("simpo", {"nll_labels": torch.zeros(8, TOKENS, dtype=torch.long)}, "nll_labels"),
    ("apo_zero_unpaired", {"kl": 0.0}, "kl"),
    # what it needs
    ("sigmoid", {"ref_logps": None}, "ref_logps"),
    ("kto", {"ref_logps": None}, "ref_logps"),
    ("kto", {"kl": None}, "kl"),
    ("kto", {"desirable": None}, "desirable"),
    # shapes, types, values
    ("sigmoid", {"ref_logps": zeros(4)}, "ref_logps"),
    ("sigmoid", {"ref_logps": torch.zeros(8, dtype=torch.long)}, "ref_logps"),
    ("sigmoid", {"ref_logps": [0.0] * 8}, "ref_logps"),
    ("sigmoid", {"ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(VOCAB, 4)}, "ref_logps and ref_hidden"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4)}, "ref_weight"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, 5, 4), "ref_weight": zeros(VOCAB, 4)}, "ref_hidden"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(9, 4)}, "ref_weight"),
    ("sigmoid", {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4), "ref_weight": zeros(VOCAB, 5)}, "ref_weight"),
    (
        "sigmoid",
        {"ref_logps": None, "ref_hidden": zeros(8, TOKENS, 4).to("meta"), "ref_weight": zeros(VOCAB, 4).to("meta")},
        "ref_hidden is on meta but hidden is on cpu",
    ),
    ("kto", {"desirable": FLAGS[:3]}, "desirable"),
    ("kto", {"desirable": FLAGS.long()}, "desirable"),
    ("kto", {"kl": zeros(8)}, "kl"),
    ("kto", {"kl": torch.tensor(True)}, "kl"),
    *(("kto", {"kl": value}, f"^kl must be a finite number, got {value}") for value in (math.nan, math.inf, -math.inf)),
    *(("kto", {"kl": value}, "^kl must be a number, got") for value in ("0.1", [0.1], True)),
    ("simpo", {"token_weights": zeros(8)}, "token_weights"),
    ("simpo", {"token_weights": torch.ones(8, TOKENS, dtype=torch.long)}, "token_weights"),
    ("simpo", {"token_weights": torch.ones(8, TOKENS, requires_grad=True)}, "token_weights"),
    ("cpo", {"nll_labels": torch.full((8, TOKENS), VOCAB)}, "nll_labels|labels"),
    ("cpo", {"nll_labels": zeros(8, TOKENS)}, "nll_labels"),
    ("simpo", {"bias": zeros(5)}, "bias"),
    ("simpo", {"head": 1.0}, "head"),
    ("simpo", {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
]


@pytest.mark.parametrize(("name", "changed", "named"), BAD_ARGUMENTS)
def test_a_bad_or_unused_argument_is_an_error_that_names_it(name, changed, named):
    with pytest.raises((TypeError, ValueError, IndexError), match=named):
        VARIANTS[name].run(make(), **changed)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "cpo", "orpo"])
def test_an_odd_number_of_sequences_is_an_error(name):
    case = make()
    odd = replace(case, hidden=case.hidden[:7], labels=case.labels[:7], ref_logps=case.ref_logps[:7])
    with pytest.raises(ValueError, match="even number of sequences"):
        VARIANTS[name].run(odd)


BAD_OBJECTIVES = [
    (ll.Objective(SIMPO(), [0, 1, 4]), "'a'.*sequences"),
    (ll.Objective(SIMPO(), [0, 8]), "'a'.*sequences"),
    (ll.Objective(SIMPO(), [0, 0]), "'a'.*sequences"),
    (ll.Objective(SIMPO(), []), "'a'.*sequences"),
    *((ll.Objective(SIMPO(), value), "'a'.*sequences must be integer") for value in (None, "04", {0, 4}, [0.0, 4.0])),
    (ll.Objective(SIMPO(), [0, 4], weight=math.nan), "'a'.*weight"),
    (ll.Objective(SIMPO(), [0, 4], kl=0.0), "'a'.*kl"),
    (ll.Objective(ll.FusedLinearDPOLoss(), [0, 4]), "'a'.*reference"),
    (ll.Objective(ll.FusedLinearDPOLoss(), [0, 4], ref_logps=zeros(8)), "'a'.*ref_logps"),
    (ll.Objective(ll.FusedLinearDPOLoss(ld_alpha=0.5), [0, 4], ref_logps=zeros(2)), "'a'.*ld_alpha"),
    (ll.Objective(ll.FusedLinearKTOLoss(), [0, 4], ref_logps=zeros(2), desirable=FLAGS[:2]), "'a'.*kl"),
    (ll.Objective(ll.FusedLinearKTOLoss(), [0, 4], ref_logps=zeros(2), desirable=FLAGS[:2], kl=math.nan), "'a'.*kl"),
    (ll.Objective(ll.FusedLinearKTOLoss(), [0, 4], ref_logps=zeros(2), desirable=FLAGS[:3], kl=0.0), "'a'.*desirable"),
]


@pytest.mark.parametrize(("objective", "named"), BAD_OBJECTIVES)
def test_a_bad_objective_is_an_error_that_names_it(objective, named):
    case = make()
    with pytest.raises((TypeError, ValueError), match=named):
        ll.FusedLinearMultiObjectiveLoss()(case.hidden, case.weight, case.labels, {"a": objective})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fn": 3}, "fn"),
        ({"fn": own_margin, "group": "token"}, "group"),
        ({"fn": own_margin, "margin": "max"}, "margin"),
        ({"fn": own_margin, "margin": "sum", "group": "batch"}, "margin"),
    ],
)
def test_a_bad_declaration_of_your_own_loss_is_an_error_that_names_it(options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        ll.FusedLinearPreferenceLoss(**options)


def test_a_loss_of_the_wrong_shape_is_an_error():
    case = make()
    with pytest.raises(ValueError, match="one loss a pair"):
        ll.FusedLinearPreferenceLoss(lambda pairs: pairs.logps)(case.hidden, case.weight, case.labels)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "kto", "aot", "orpo", "wpo"])
def test_no_sequences_at_all_is_a_loss_of_0(name):
    case = make()
    none = replace(
        case, hidden=case.hidden[:0], labels=case.labels[:0], ref_logps=case.ref_logps[:0], desirable=case.desirable[:0]
    )
    out = VARIANTS[name].run(none)
    assert out.loss.item() == 0
    assert all((g == 0).all() for g in gradients(out.loss, case))


# The page on losses

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_examples_of_the_page_on_losses_run():
    registry = dict(DPO_LOSSES)
    blocks = [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL) if "import" in b]
    assert len(blocks) == 2
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), {})
    finally:
        DPO_LOSSES.clear()
        DPO_LOSSES.update(registry)


def test_conventions_are_backed_by_tests_that_exist():
    files = [
        Path(__file__).with_name(f"test_losses_{name}.py").read_text(encoding="utf8") for name in ("trl", "liger", "float64")
    ]
    page = PAGE.read_text(encoding="utf8")
    for row in page[page.index("## Conventions") : page.index("## Your own loss")].splitlines():
        named = re.findall(r"`(test_\w+)`", row)
        if row.startswith("|") and not row.startswith(("| subject", "|---")):
            assert named, row
        for name in named:
            assert any(f"def {name}(" in text for text in files), name
    for name in DPO_LOSSES | CPO_LOSSES | KTO_LOSSES:
        assert f"`{name}`" in page or f'"{name}"' in page
