"""Means, variances and whitening over the tokens that a mask keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitless.fused.rl.masked import masked_mean, masked_var, masked_whiten

from .tokens import F32, F64, INF, NAN, ROUND, quick


@quick()
@given(shape=st.sampled_from([(5,), (3, 4), (2, 3, 4)]), seed=st.integers(0, 20), shift=st.booleans())
def test_masked_statistics_are_those_of_the_values_that_are_kept(shape, seed, shift):
    g = torch.Generator().manual_seed(seed)
    values, mask = 3 + torch.randn(shape, generator=g, dtype=F64), torch.rand(shape, generator=g) < 0.8
    mask.view(-1)[:2] = True
    kept = values[mask]
    for dtype in (F32, F64):
        rtol = {F32: 4 * ROUND[F32], F64: 1e-13}[dtype]
        kept = values.to(dtype)[mask].double()
        for garbage in (NAN, INF):
            dirty = values.to(dtype).masked_fill(~mask, garbage)
            torch.testing.assert_close(masked_mean(dirty, mask), kept.mean().to(dtype), rtol=rtol, atol=0)
            torch.testing.assert_close(masked_var(dirty, mask), kept.var().to(dtype), rtol=rtol, atol=1e-14)
            biased = masked_var(dirty, mask, unbiased=False)
            torch.testing.assert_close(biased, kept.var(unbiased=False).to(dtype), rtol=rtol, atol=1e-14)
            white = masked_whiten(dirty, mask, shift_mean=shift)
            wanted = (kept - kept.mean()) / (kept.var() + 1e-8).sqrt() + (0 if shift else kept.mean())
            torch.testing.assert_close(white[mask], wanted.to(dtype), rtol=rtol, atol=1e-13)
            assert (white[~mask] == 0).all()
    everything = torch.ones_like(mask)
    for function in (masked_mean, masked_var, masked_whiten):
        torch.testing.assert_close(function(values), function(values, everything), rtol=1e-14, atol=1e-14)


def test_masked_statistics_are_differentiable_and_masked_values_have_no_gradient():
    values = torch.randn(6, dtype=F64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, False, True])
    for function in (masked_mean, masked_var, masked_whiten):
        assert torch.autograd.gradcheck(lambda v, f=function: f(v, mask), values)
        dirty = values.detach().masked_fill(~mask, NAN).requires_grad_()
        (grad,) = torch.autograd.grad(function(dirty, mask).square().sum(), dirty)
        assert (grad[~mask] == 0).all() and grad.isfinite().all()


def test_masked_statistics_of_too_few_values():
    values, nothing = torch.tensor([NAN, 2.0]), torch.tensor([False, False])
    assert masked_mean(values, nothing) == 0
    assert masked_var(values, nothing, unbiased=False) == 0
    with pytest.raises(ValueError, match="mask must leave at least 2 values for whitening, got 1"):
        masked_whiten(values, torch.tensor([False, True]))
    with pytest.raises(ValueError, match="mask must leave at least 2 values for an unbiased variance, got 0"):
        masked_var(values, nothing)
    with pytest.raises(ValueError, match="values must leave at least 2 values"):
        masked_whiten(torch.ones(1))
    with pytest.raises(ValueError, match=r"mask must have shape \(2,\) like values"):
        masked_mean(values, torch.tensor([True]))
    with pytest.raises(ValueError, match="eps must be a finite number"):
        masked_whiten(values, eps=0)
