"""KL estimates in high precision, and rewards that they shape."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from logitless.fused.rl.advantages import kl_shaped_rewards
from logitless.fused.rl.kl import KL_ESTIMATORS, kl_estimate

from .tokens import F32, F64, NAN, ROUND, padded, some_tokens


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
def test_kl_shaped_rewards_are_a_loop(estimator, clip):
    g = torch.Generator().manual_seed(3)
    lengths = [3, 0, 5, 1]
    logps, ref, bounds, mask = some_tokens(lengths, holes=0.3, seed=3, dtype=F64)
    mask[-1] = False  # a sequence whose tokens are all masked
    rewards = torch.randn(4, generator=g, dtype=F64)
    wanted = torch.zeros(9, dtype=F64)
    for j, (a, b) in enumerate(itertools.pairwise(bounds)):
        tokens = [t for t in range(a, b) if mask[t]]
        for t in tokens:
            d = float(logps[t] - ref[t])
            wanted[t] = -0.2 * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
        if tokens:
            reward = float(rewards[j])
            wanted[tokens[-1]] += reward if clip is None else min(max(reward, clip[0]), clip[1])
    options = {"kl_coef": 0.2, "kl_estimator": estimator, "reward_clip_range": clip}
    dirty = [t.masked_fill(~mask, NAN) for t in (logps, ref)]
    got = kl_shaped_rewards(rewards, *dirty, cu_seqlens=torch.tensor(bounds), mask=mask, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    rows = [padded(t, bounds, fill=NAN) for t in (logps, ref)]
    there = padded(mask, bounds)
    kept = kl_shaped_rewards(rewards, *rows, mask=there, **options)
    torch.testing.assert_close(kept[there], wanted[mask], rtol=1e-12, atol=1e-12)
    assert (kept[~there] == 0).all()


def test_bad_input_of_kl_shaped_rewards():
    logps, offsets = torch.zeros(4), torch.tensor([0, 2, 4])
    good = {"rewards": torch.zeros(2), "logps": logps, "ref_logps": logps, "cu_seqlens": offsets, "kl_coef": 0.1}
    for changes, error, message in (
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards must have shape \[2\]"),
        ({"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must have shape \(4,\) like logps"),
        ({"kl_coef": -1}, ValueError, "kl_coef must be a finite number"),
        ({"kl_estimator": "kl"}, ValueError, r"kl_estimator must be one of \['k1', 'k2', 'k3'\], got 'kl'"),
        ({"reward_clip_range": 1.0}, TypeError, "reward_clip_range must be a pair"),
        ({"reward_clip_range": (1.0, -1.0)}, ValueError, r"reward_clip_range\[1\] must be a finite number"),
        ({"cu_seqlens": None}, ValueError, r"logps must have shape \[S, T\], or \[N\] with cu_seqlens"),
    ):
        with pytest.raises(error, match=message):
            kl_shaped_rewards(**{**good, **changes})


@pytest.mark.parametrize("dtype", [F32, F64])
def test_k3_keeps_its_precision_however_small_the_log_ratio_is(dtype):
    d = torch.cat([s * torch.logspace(-18, 1.5, 200, dtype=F64).to(dtype) for s in (1, -1)])
    with mpmath.workdps(60):
        wanted = [mpmath.exp(-mpmath.mpf(x)) - 1 + mpmath.mpf(x) for x in d.tolist()]
        got = kl_estimate(d, torch.zeros_like(d), "k3").tolist()
        assert max(abs(mpmath.mpf(a) / b - 1) for a, b in zip(got, wanted, strict=True)) <= 16 * ROUND[dtype]
        x = d.clone().requires_grad_()
        (grad,) = torch.autograd.grad(kl_estimate(x, torch.zeros_like(d), "k3").sum(), x)
        slopes = [1 - mpmath.exp(-mpmath.mpf(value)) for value in d.tolist()]
        assert max(abs(mpmath.mpf(a) / b - 1) for a, b in zip(grad.tolist(), slopes, strict=True)) <= 16 * ROUND[dtype]


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
def test_kl_estimates_are_differentiable(estimator):
    logps = torch.tensor([-1.0, -0.3, -2.0, -0.7, -4.0], dtype=F64, requires_grad=True)
    ref = torch.tensor([-1.1, -0.9, -1.0, -0.7000001, -0.1], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, estimator), (logps, ref))
    assert torch.autograd.gradgradcheck(lambda a, b: kl_estimate(a, b, estimator), (logps, ref))


def test_kl_estimates_of_16_bits_are_float32_and_k3_is_bounded():
    assert kl_estimate(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), "k2").dtype == F32
    logps = torch.tensor([-200.0, -1.0], requires_grad=True)
    out = kl_estimate(logps, torch.tensor([0.0, -1.0]), "k3")
    (grad,) = torch.autograd.grad(out.sum(), logps)
    assert out.tolist() == [pytest.approx(math.exp(80), rel=1e-6), 0] and grad.tolist() == [0, 0]


def test_bad_input_of_kl_estimate():
    with pytest.raises(ValueError, match=r"estimator must be one of \['k1', 'k2', 'k3'\], got 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="ref_logps must have shape"):
        kl_estimate(torch.zeros(2), torch.zeros(3))
