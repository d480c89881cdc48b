"""PPO's loss against formulas written out in plain PyTorch on materialised float64 logits, as verl and OpenRLHF have them.

In float64 values and gradients of hidden states, weight and bias agree to 1e-10; in the other dtypes they lose no more than a
small multiple of what the same formulas lose in plain PyTorch, in that dtype, on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from logitless.fused.policy.base import PolicyOutput

from ..helpers import relative_error

EVERY_BACKEND = True

SEQUENCES, TOKENS, HIDDEN, VOCAB = 5, 23, 32, 211
#: Scored tokens of each sequence, two holes apart.
LENGTHS = (23, 12, 1, 0, 17)
IGNORE = -100
MAX_LENGTH = 40
#: Of a policy's log-probability over the old one's: clipped below, kept, clipped above, beyond the dual clip. Far enough from
#: every bound that no rounding moves a token over it.
LOG_RATIOS = torch.tensor([-0.9, 0.02, 0.7, 1.7], dtype=torch.float64)


# The inputs


@dataclass
class Inputs:
    """hidden (S, T, H), weight (V, H), bias (V,), labels (S, T); what is known of each token (S, T)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    head: ll.HeadSpec = field(default_factory=ll.HeadSpec)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t.requires_grad]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers as leaves of another dtype."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        return replace(self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=leaf(self.bias))


def make(logits: str = "random", seed: int = 0, train: str = "hwb", head: ll.HeadSpec | None = None) -> Inputs:
    """``peaked``: most labels have p above 0.99, a tenth are below 1e-6."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(VOCAB, (SEQUENCES, TOKENS), generator=g)
    x, w, b = normal(SEQUENCES, TOKENS, HIDDEN), normal(VOCAB, HIDDEN) * 0.35, normal(VOCAB) * 0.5
    if logits == "peaked":
        kind = torch.rand(SEQUENCES, TOKENS, generator=g)
        nats = torch.where(kind < 0.7, 28.0, torch.where(kind > 0.9, -25.0, 6.0))
        rows = w[labels]
        x = 0.3 * x + nats[..., None] * rows / rows.square().sum(-1, keepdim=True)
    masked = torch.arange(TOKENS) >= torch.tensor(LENGTHS)[:, None]
    masked[0, 5:7] = masked[4, 0] = True
    labels = labels.masked_fill(masked, IGNORE)
    x, w, b = (t.requires_grad_(key in train) for t, key in ((x, "h"), (w, "w"), (b, "b")))
    nothing = torch.zeros(labels.shape, dtype=torch.float64)
    case = Inputs(x, w, b, labels, nothing, nothing, nothing, ll.HeadSpec() if head is None else head)
    with torch.no_grad():
        logps = statistics(case)[0]
    case.old_logps = logps - LOG_RATIOS[torch.randint(len(LOG_RATIOS), labels.shape, generator=g)]
    case.ref_logps = logps + 0.4 * normal(*labels.shape)
    case.advantages = normal(*labels.shape)
    return case


# The reference: log-probabilities and entropies from all logits, then formulas


def statistics(case: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (S, T), in float32 at least; 0 where nothing is scored."""
    scored = case.labels != IGNORE
    z = case.head.apply(F.linear(case.hidden[scored], case.weight, case.bias))
    z = z if z.dtype == torch.float64 else z.float()
    all_logps = z.log_softmax(-1)
    logps = all_logps.gather(-1, case.labels[scored][:, None])[:, 0]
    entropies = -(all_logps.exp() * all_logps).sum(-1)
    zeros = torch.zeros(case.labels.shape, dtype=z.dtype)
    return zeros.masked_scatter(scored, logps), zeros.masked_scatter(scored, entropies)


def verl(logps: Tensor, case: Inputs, low: float, high: float, dual: float | None) -> Tensor:
    """``compute_policy_loss_vanilla``. (S, T)"""
    a = case.advantages.to(logps.dtype)
    ratio = torch.exp(logps - case.old_logps.to(logps.dtype))
    losses = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - low, 1 + high))
    if dual is None:
        return losses
    return torch.where(a < 0, torch.min(-a * dual, losses), losses)


def openrlhf(logps: Tensor, case: Inputs, low: float, high: float, dual: float | None) -> Tensor:
    """``PolicyLoss``. (S, T)"""
    a = case.advantages.to(logps.dtype)
    ratio = (logps - case.old_logps.to(logps.dtype)).exp()
    clipped = torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    if dual is None:
        return -clipped
    return -torch.where(a < 0, torch.max(clipped, dual * a), clipped)


def kl(logps: Tensor, case: Inputs, kind: str) -> Tensor:
    """verl's ``kl_penalty``, with its straight-through estimators. (S, T)"""
    d = logps - case.ref_logps.to(logps.dtype)
    value = {"k1": d, "k2": 0.5 * d.square(), "k3": torch.exp(-d) - 1 + d}[kind.rstrip("+")]
    if not kind.endswith("+"):
        return value
    carrier = 0.5 * d.square()
    return carrier - carrier.detach() + value.detach()


def aggregated(values: Tensor, mask: Tensor, aggregation: str) -> Tensor:
    """verl's ``agg_loss``; sequences without tokens count, as in TRL and OpenRLHF. values (S, T) -> 0-dim."""
    values = torch.where(mask, values, 0)
    if aggregation == "token-mean":
        return values.sum() / mask.sum()
    sums = values.sum(-1)
    if aggregation == "sequence-mean":
        return (sums / mask.sum(-1).clamp(min=1)).mean()
    return sums.mean() if aggregation == "sequence-mean-token-sum" else (sums / MAX_LENGTH).mean()


AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-mean-token-sum", "fixed-length")


@dataclass
class Variant:
    """A module's options, and the loss of a token by its formula."""

    options: dict[str, Any]
    of: Callable[..., Tensor] = verl

    def formula(self, case: Inputs, logps: Tensor, entropies: Tensor, aggregation: str = "token-mean") -> Tensor:
        o, mask = self.options, case.labels != IGNORE
        low = o.get("clip_low", 0.2)
        losses = self.of(logps, case, low, o.get("clip_high", low), o.get("dual_clip"))
        if "kl_coef" in o:
            losses = losses + o["kl_coef"] * kl(logps, case, o.get("kl_estimator", "k3"))
        loss = aggregated(losses, mask, aggregation)
        return loss - o.get("entropy_coef", 0.0) * aggregated(entropies, mask, aggregation)

    def expected(self, case: Inputs, aggregation: str = "token-mean") -> Tensor:
        return self.formula(case, *statistics(case), aggregation)

    def run(self, case: Inputs, aggregation: str = "token-mean", **changed: Any) -> PolicyOutput:
        length = MAX_LENGTH if aggregation == "fixed-length" else None
        module = ll.FusedLinearPPOLoss(aggregation=aggregation, max_length=length, **self.options)
        given: dict[str, Any] = {"advantages": case.advantages, "old_logps": case.old_logps, "bias": case.bias}
        if "kl_coef" in self.options:
            given["ref_logps"] = case.ref_logps
        return module(case.hidden, case.weight, case.labels, head=case.head, **{**given, **changed})


VARIANTS = {
    "verl": Variant({}),
    "openrlhf": Variant({}, openrlhf),
    "asymmetric": Variant({"clip_low": 0.3, "clip_high": 0.4}),
    "unclipped below": Variant({"clip_low": 1.0, "clip_high": 0.2}, openrlhf),
    "verl dual": Variant({"dual_clip": 3.0}),
    "openrlhf dual": Variant({"clip_low": 0.3, "dual_clip": 3.0}, openrlhf),
    "entropy": Variant({"entropy_coef": 0.1}),
    "against entropy": Variant({"entropy_coef": -0.3, "dual_clip": 3.0}),
    **{kind: Variant({"kl_coef": 0.3, "kl_estimator": kind}) for kind in ("k1", "k2", "k3", "k1+", "k3+")},
    "everything": Variant(
        {"clip_low": 0.3, "clip_high": 0.4, "dual_clip": 3.0, "kl_coef": 0.2, "kl_estimator": "k3+", "entropy_coef": 0.05}
    ),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
both_logits = pytest.mark.parametrize("logits", ["random", "peaked"])
SOME = ["verl dual", "entropy", "k3", "everything"]
#: Bytes in float64, and how many tiles the 50 tokens then take.
BUDGETS = {"one tile": (1 << 30, 1), "many tiles": (30_000, 4), "a token a tile": (1, 50)}


def gradients(loss: Tensor, case: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.leaves, retain_graph=True))


def assert_close(loss: Tensor, case: Inputs, expected: Tensor) -> None:
    """Value, and the gradient of every leaf."""
    assert loss.dtype == torch.float64
    assert abs(loss.item() - expected.item()) <= 1e-10 * max(1.0, abs(expected.item()))
    for ours, exact in zip(gradients(loss, case), gradients(expected, case), strict=True):
        assert exact.abs().max() > 0
        assert relative_error(ours, exact) <= 1e-10


def test_peaked_logits_are_peaked():
    case = make("peaked")
    p = statistics(case)[0].exp()[case.labels != IGNORE]
    assert (p > 0.99).double().mean() > 0.5
    assert (p < 1e-6).sum() >= 3


def test_every_bound_is_reached():
    case = make()
    out = VARIANTS["everything"].run(case)
    assert all(out.metrics["clip_fraction" + part].item() >= 0.05 for part in ("", "/low", "/high", "/dual"))


FORWARD = "gradient_in_forward"


# float64


@every_variant
@both_logits
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_and_all_gradients_equal_the_formula(name, logits, aggregation):
    case, variant = make(logits), VARIANTS[name]
    out = variant.run(case, aggregation)
    assert out.plan.schedule == FORWARD
    assert_close(out.loss, case, variant.expected(case, aggregation))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    ("budget", "aggregation"),
    [("many tiles", "token-mean"), ("many tiles", "sequence-mean"), ("a token a tile", "fixed-length")],
)
@pytest.mark.parametrize("logits", ["peaked"])
def test_value_and_all_gradients_equal_the_formula_in_any_number_of_tiles(name, logits, budget, aggregation):
    case, variant, (size, tiles) = make(logits), VARIANTS[name], BUDGETS[budget]
    with ll.settings(memory_budget=size):
        out = variant.run(case, aggregation)
    assert len(out.plan.steps) >= tiles
    assert {step.schedule for step in out.plan.steps} == {FORWARD}
    assert_close(out.loss, case, variant.expected(case, aggregation))


@every_variant
@both_logits
@pytest.mark.parametrize("budget", ["one tile", "many tiles"])
def test_scale_soft_cap_temperature_and_bias_are_part_of_every_loss(name, logits, budget):
    case, variant = make(logits, head=ll.HeadSpec(logit_scale=0.7, softcap=9.0, temperature=1.3)), VARIANTS[name]
    with ll.settings(memory_budget=BUDGETS[budget][0]):
        out = variant.run(case)
    assert_close(out.loss, case, variant.expected(case))


@pytest.mark.parametrize(("name", "softcap"), [("verl dual", None), ("k3", 9.0), ("entropy", None), ("everything", 9.0)])
@pytest.mark.parametrize("budget", ["one tile", "many tiles"])
@pytest.mark.parametrize("train", ["", "h", "w", "b", "hw", "hb", "wb", "hwb"])
def test_value_and_gradients_of_what_is_trained(name, budget, train, softcap):
    case, variant = make("peaked", train=train, head=ll.HeadSpec(softcap=softcap)), VARIANTS[name]
    with ll.settings(memory_budget=BUDGETS[budget][0]):
        out = variant.run(case)
    expected = variant.expected(case)
    if train:
        assert out.plan.schedule == ("deferred_scale" if train == "h" and "entropy_coef" not in variant.options else FORWARD)
        assert_close(out.loss, case, expected)
    else:
        assert out.plan.schedule == "forward_only"
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", ["verl dual", "k3", "k1+", "entropy", "everything"])
def test_an_advantage_for_each_sequence_is_that_of_its_tokens(name):
    case, variant = make(), VARIANTS[name]
    case.advantages = case.advantages[:, :1].expand(case.labels.shape)
    out = variant.run(case, advantages=case.advantages[:, 0])
    assert_close(out.loss, case, variant.expected(case))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["verl dual", "k2", "k3", "entropy"])  # straight-through gradients are none of the value
def test_gradcheck(name, softcap):
    case = make(head=ll.HeadSpec(softcap=softcap, temperature=0.8))
    here = slice(1, 3), slice(0, 5)
    x, w, b = (t.detach().clone().requires_grad_() for t in (case.hidden[here][..., :3], case.weight[:11, :3], case.bias[:11]))
    labels = torch.where(case.labels[here] == IGNORE, IGNORE, case.labels[here] % 11)
    small = replace(case, labels=labels, advantages=case.advantages[here])
    with torch.no_grad():
        logps = statistics(replace(small, hidden=x, weight=w, bias=b))[0]
        small.old_logps = logps - LOG_RATIOS[torch.arange(logps.numel()) % 4].view(logps.shape)
        small.ref_logps = logps - 0.3
    assert (labels != IGNORE).sum() == 6
    for budget in (1 << 30, 1):
        with ll.settings(memory_budget=budget):
            assert torch.autograd.gradcheck(
                lambda x, w, b: VARIANTS[name].run(replace(small, hidden=x, weight=w, bias=b)).loss,
                (x, w, b),
                fast_mode=budget == 1 or name != "entropy",
            )


# What comes back


@both_logits
@pytest.mark.parametrize("budget", BUDGETS)
def test_log_probabilities_entropies_and_metrics(logits, budget):
    case, variant = make(logits), VARIANTS["everything"]
    with ll.settings(memory_budget=BUDGETS[budget][0]):
        out = variant.run(case)
    logps, entropies = (t.detach() for t in statistics(case))
    assert out.ref_logps is None
    for ours, exact in ((out.logps, logps), (out.entropies, entropies)):
        assert ours.dtype == torch.float64
        assert not ours.requires_grad
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-13)
    mask = case.labels != IGNORE
    d, a = (logps - case.old_logps)[mask], case.advantages[mask]
    ratio = d.exp()
    exact = {
        "ratio": ratio,
        "approx_kl": -d,
        "approx_kl_k3": ratio - 1 - d,
        "clip_fraction/low": (ratio < 0.7) & (a < 0),
        "clip_fraction/high": (ratio > 1.4) & (a > 0),
        "clip_fraction": ((ratio < 0.7) & (a < 0)) | ((ratio > 1.4) & (a > 0)),
        "clip_fraction/dual": (ratio > 3.0) & (a < 0),
        "kl": kl(logps, case, "k3")[mask],
        "entropy": entropies[mask],
    }
    assert exact.keys() == out.metrics.keys()
    for key, value in exact.items():
        assert out.metrics[key].item() == pytest.approx(value.double().mean().item(), rel=1e-9), key


# float32, bfloat16 and float16


def errors(variant: Variant, case: Inputs) -> tuple[list[float], list[float]]:
    """How far the gradients are off, relatively: ours, and plain PyTorch's. The loss's error is looked at here."""
    exact_case = case.to(torch.float64)
    exact_stats = statistics(exact_case)
    exact = variant.formula(exact_case, *exact_stats)
    right = gradients(exact, exact_case)
    plain_stats = statistics(case)
    plain = variant.formula(case, *plain_stats)
    out = variant.run(case)
    slopes = torch.autograd.grad(exact, exact_stats, allow_unused=True, retain_graph=True)
    moves = [(g * (p - e)).abs().sum() for g, p, e in zip(slopes, plain_stats, exact_stats) if g is not None]
    found = []
    for loss in (out.loss, plain):
        got = gradients(loss, case)
        assert all(g.dtype == case.hidden.dtype for g in got)
        found.append([relative_error(g, r) for g, r in zip(got, right, strict=True)])
    plain_error = max(abs(plain.item() - exact.item()), sum(m.item() for m in moves))
    assert abs(out.loss.item() - exact.item()) <= 2 * plain_error + 2.0**-24 * abs(exact.item())
    return found[0], found[1]


def assert_loses_no_more_than_plain_pytorch(variant: Variant, cases: list[Inputs], dtype: torch.dtype) -> None:
    """Twice plain PyTorch's error at most, and two roundings of the result; root mean square over a few batches.

    A logit z behind a soft-cap comes from a tile of float32 exponentials, ``z = k + log(e)``. A vectorised logarithm is
    right to one unit in the last place (on some CPUs to half of it), e and z are rounded once each, and ``|log(e)|`` and
    ``|z|`` are at most about the cap. So ``(z / cap)**2`` is known to three roundings, and the slope ``1 - (z / cap)**2``
    to three over the slope. (A 16-bit dtype's own rounding is larger than that.)
    """
    ours, plain = (torch.zeros(len(cases[0].leaves)) for _ in range(2))
    rounding = torch.finfo(dtype).eps
    for case in cases:
        mine, its = errors(variant, case.to(dtype))
        ours, plain = (total + torch.tensor(found).square() / len(cases) for total, found in ((ours, mine), (plain, its)))
    if dtype == torch.float32 and cases[0].head.softcap is not None:
        z = torch.cat([case.head.apply(F.linear(case.hidden, case.weight, case.bias)).flatten() for case in cases])
        rounding *= 3 / (1 - (z * case.head.temperature / case.head.softcap).abs().max().item() ** 2)
    assert (ours.sqrt() <= 2 * plain.sqrt() + rounding).all(), (ours.sqrt(), plain.sqrt())


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.mark.parametrize("name", ["asymmetric", "openrlhf dual", "against entropy", "k1", "k3", "everything"])
@both_logits
@every_dtype
def test_loses_no_more_than_plain_pytorch(name, logits, dtype):
    assert_loses_no_more_than_plain_pytorch(VARIANTS[name], [make(logits, seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("name", ["verl dual", "everything"])
@both_logits
@every_dtype
def test_loses_no_more_than_plain_pytorch_in_many_tiles(name, logits, dtype):
    with ll.settings(memory_budget=BUDGETS["many tiles"][0] * max(2, dtype.itemsize) // 8):
        assert_loses_no_more_than_plain_pytorch(VARIANTS[name], [make(logits, seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("name", ["verl dual", "entropy"])
@both_logits
@every_dtype
def test_loses_no_more_than_plain_pytorch_behind_a_soft_cap(name, logits, dtype):
    head = ll.HeadSpec(logit_scale=0.9, softcap=20.0, temperature=1.1)
    cases = [make(logits, seed, head=head) for seed in range(3)]
    assert_loses_no_more_than_plain_pytorch(VARIANTS[name], cases, dtype)


@both_logits
@every_dtype
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("train", ["h", "hwb"])
def test_the_gradient_of_the_entropy_alone_loses_no_more_than_plain_pytorch(logits, dtype, softcap, train):
    """From a tile of rounded exponentials: their logarithms must not cost more than plain PyTorch's rounded logits."""
    cases = [make(logits, seed, train, ll.HeadSpec(softcap=softcap)) for seed in range(3)]
    cases = [replace(case, advantages=torch.zeros_like(case.advantages)) for case in cases]
    assert_loses_no_more_than_plain_pytorch(Variant({"entropy_coef": 1.0}), cases, dtype)
