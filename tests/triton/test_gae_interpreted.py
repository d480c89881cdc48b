"""Triton's kernel of generalized advantage estimation, against a loop in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ..rl.tokens import F32, F64, gae_limit, naive_gae
from .conftest import DEVICE

pytest.importorskip("triton")
from logitless.kernels.backends.triton import gae as kernels

BF16 = torch.bfloat16
#: The interpreter scans token by token.
SMALL_BLOCK = 16
quick = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check(lengths, gamma, lam, *, holes=False, bootstrap=False, rewards_as=F32, values_as=F32, seed=0):
    """Advantages and returns of random segments, in every type of the results."""
    g = torch.Generator().manual_seed(seed)
    n, bounds = sum(lengths), [0, *itertools.accumulate(lengths)]
    rewards = torch.randn(n, generator=g, dtype=F64).to(rewards_as)
    values = torch.randn(n, generator=g, dtype=F64).to(values_as)
    mask = torch.rand(n, generator=g) < 0.6 if holes else None
    last = torch.randn(len(lengths), generator=g, dtype=F64).to(values_as) if bootstrap else None
    wanted = naive_gae(rewards, values, bounds, gamma, lam, mask, last)
    if mask is not None:
        rewards, values = rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    inputs = [t if t is None else t.to(DEVICE) for t in (rewards, values, torch.tensor(bounds), mask, last)]
    for dtype in (F32, F64):
        got = kernels.gae(*inputs[:4], gamma, gamma * lam, inputs[4], dtype)
        for tensor, expected in zip(got, wanted[:2], strict=True):
            assert tensor.dtype == dtype
            assert ((tensor.cpu().double() - expected).abs() <= gae_limit(expected, wanted[2], dtype)).all()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", SMALL_BLOCK)


@quick
@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 2, 5, 15, 16, 17, 32, 40, 65]), max_size=6),
    decay=st.sampled_from([(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.0, 0.5), (0.7, 0.0)]),
    holes=st.booleans(),
    bootstrap=st.booleans(),
    seed=st.integers(0, 9),
)
@example(lengths=[], decay=(1.0, 1.0), holes=False, bootstrap=False, seed=0)
@example(lengths=[0, 0], decay=(1.0, 1.0), holes=True, bootstrap=True, seed=0)
@example(lengths=[0, 49, 0, 0, 1, 0], decay=(1.0, 0.5), holes=True, bootstrap=True, seed=1)
def test_gae_of_any_segments(small_blocks, lengths, decay, holes, bootstrap, seed):
    check(lengths, *decay, holes=holes, bootstrap=bootstrap, seed=seed)


@pytest.mark.parametrize(("rewards", "values"), [(F32, BF16), (BF16, F32), (F64, F32), (F32, F64)])
def test_gae_of_any_types(small_blocks, rewards, values):
    check([20, 0, 33], 0.98, 0.9, holes=True, bootstrap=True, rewards_as=rewards, values_as=values)


def test_gae_of_the_block_that_is_shipped():
    assert kernels.BLOCK == 1024
    check([3, kernels.BLOCK + 5], 1.0, 0.97, holes=True)


def test_a_segment_that_is_not_finite_leaves_the_others_as_they_are(small_blocks):
    values = torch.zeros(60, device=DEVICE)
    rewards = torch.randn(60, device=DEVICE)
    offsets = torch.tensor([0, 20, 40, 60], device=DEVICE)
    clean = kernels.gae(rewards, values, offsets, None, 1.0, 0.9, None, F32)
    rewards[25] = torch.nan
    for before, after in zip(clean, kernels.gae(rewards, values, offsets, None, 1.0, 0.9, None, F32), strict=True):
        assert after.isnan().nonzero()[:, 0].tolist() == list(range(20, 26))
        assert torch.equal(after[after.isfinite()], before[after.isfinite()])
