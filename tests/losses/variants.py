"""Every preference loss and every variant as a formula in plain PyTorch on materialised float64 logits, and the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll

from ..helpers import relative_error

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

every_budget = pytest.mark.parametrize("budget", BUDGETS)


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


def prompt_and_response(labels: Tensor) -> Tensor:
    """Labels of the NLL: the response but for a few tokens, a few others' labels changed, and what is masked besides."""
    g = torch.Generator().manual_seed(11)
    other = torch.randint(VOCAB, labels.shape, generator=g)
    kind = torch.rand(labels.shape, generator=g)
    mine = torch.where((labels == IGNORE) | (kind < 0.2), other, labels)
    return mine.masked_fill(kind > 0.8, IGNORE)


def own_margin(pairs: ll.Pairs) -> Tensor:
    return torch.tanh(0.05 * (pairs.chosen_logps - pairs.rejected_logps)) ** 2
