"""Generalized advantage estimation against a loop over tokens in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from logitless.fused.rl.gae import GAE, gae

from .tokens import F32, F64, INF, NAN, check_gae, naive_gae, padded, quick, some_tokens

lengths_of_any_kind = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 63, 64, 65, 130]), max_size=7)
decays = st.sampled_from([(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.0, 0.5), (0.7, 0.0)])


@quick()
@given(lengths=lengths_of_any_kind, decay=decays, holes=st.booleans(), bootstrap=st.booleans(), seed=st.integers(0, 9))
@example(lengths=[], decay=(1.0, 1.0), holes=False, bootstrap=True, seed=0)
@example(lengths=[0, 0], decay=(1.0, 1.0), holes=True, bootstrap=True, seed=0)
@example(lengths=[5000], decay=(1.0, 1.0), holes=False, bootstrap=True, seed=0)
@example(lengths=[1] * 100, decay=(0.9, 0.9), holes=True, bootstrap=True, seed=0)
def test_gae_is_the_loop_over_tokens(lengths, decay, holes, bootstrap, seed):
    for dtype in (F32, F64):
        rewards, values, bounds, mask = some_tokens(lengths, holes=0.4 * holes, seed=seed, dtype=dtype)
        last = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed), dtype=dtype) if bootstrap else None
        wanted = naive_gae(rewards, values, bounds, *decay, mask, last)
        gamma, lam = decay
        options = {"gamma": gamma, "lam": lam, "last_values": last}
        check_gae(gae(rewards, values, cu_seqlens=torch.tensor(bounds), mask=mask, **options), wanted, dtype)
        there = padded(torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask, bounds, left=seed % 2 == 1)
        r, v = (padded(t, bounds, fill=NAN, left=seed % 2 == 1) for t in (rewards, values))
        found = gae(r, v, mask=there, **options)
        kept = torch.ones(len(rewards), dtype=torch.bool) if mask is None else mask
        for tensor in found:
            assert tensor.shape == r.shape
            assert (tensor[~there] == 0).all()
        check_gae([t[there] for t in found], [t[kept] for t in wanted], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, F64])
def test_gae_returns_at_least_float32(dtype):
    rewards, values, bounds, _ = some_tokens([3, 9], dtype=dtype)
    out = gae(rewards, values.to(torch.bfloat16), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    check_gae(out, naive_gae(rewards, values.to(torch.bfloat16), bounds, 1.0, 0.95), F64 if dtype == F64 else F32)
    assert isinstance(out, GAE)


def test_gae_takes_any_strides_and_gives_no_gradient():
    rewards, values = (torch.randn(9, 4, dtype=F64).t().requires_grad_() for _ in range(2))
    mask = (torch.rand(9, 4) < 0.7).t()
    got = gae(rewards, values, mask=mask, gamma=0.9)
    for a, b in zip(got, gae(rewards.contiguous(), values.contiguous(), mask=mask.contiguous(), gamma=0.9), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_gae_of_verl_where_holes_do_not_end_a_sequence():
    """verl's loop, over padded tensors, before it whitens."""
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(5, 12, generator=g, dtype=F64) for _ in range(2))
    mask = torch.rand(5, 12, generator=g) < 0.7
    gamma, lam, on = 0.97, 0.9, mask.double()
    following = advantage = torch.zeros(5, dtype=F64)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(12)):
        candidate = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        following = values[:, t] * on[:, t] + (1 - on[:, t]) * following
        advantage = candidate * on[:, t] + (1 - on[:, t]) * advantage
        advantages[:, t] = advantage
    got = gae(rewards, values, mask=mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(got.advantages, advantages * on, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.returns, (advantages + values) * on, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_what_stands_at_masked_positions_changes_nothing_in_gae(garbage):
    rewards, values, bounds, mask = some_tokens([70, 0, 5, 64], holes=0.5)
    clean = gae(rewards, values, cu_seqlens=torch.tensor(bounds), mask=mask)
    dirty = gae(
        rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), cu_seqlens=torch.tensor(bounds), mask=mask
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()


@pytest.mark.parametrize("garbage", [NAN, INF, 3.0])
def test_a_segment_does_not_change_its_neighbours(garbage):
    rewards, values, bounds, _ = some_tokens([70, 33, 5, 64, 1, 300])
    offsets, last = torch.tensor(bounds), torch.randn(6)
    clean = gae(rewards, values, cu_seqlens=offsets, last_values=last)
    for j, (a, b) in enumerate(itertools.pairwise(bounds)):
        r, v, end = rewards.clone(), values.clone(), last.clone()
        r[a:b] = v[a:b] = end[j] = garbage
        for before, after in zip(clean, gae(r, v, cu_seqlens=offsets, last_values=end), strict=True):
            assert torch.equal(before[:a], after[:a])
            assert torch.equal(before[b:], after[b:])
            assert not torch.equal(before[a:b], after[a:b])


def test_a_value_that_is_not_finite_spoils_only_what_comes_before_it():
    rewards, values, bounds, _ = some_tokens([200])
    rewards[150] = NAN
    got = gae(rewards, values, cu_seqlens=torch.tensor(bounds))
    assert got.advantages.isnan().nonzero()[:, 0].tolist() == list(range(151))


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_gae_is_no_loop_over_tokens_or_segments():
    counts = []
    for n, size in ((20_000, 20_000), (80_000, 80_000), (80_000, 10)):
        offsets = torch.arange(0, n + 1, size)
        with _Count() as mode:
            gae(torch.zeros(n), torch.zeros(n), cu_seqlens=offsets)
        counts.append(mode.calls)
    assert max(counts) < 80_000 / 10
    assert counts[1] == counts[2]  # whatever the segments


BAD_GAE = [
    ({"rewards": [1.0]}, TypeError, "rewards must be a torch.Tensor, got list"),
    ({"rewards": torch.zeros(4, dtype=torch.long)}, TypeError, "rewards must be floating point, got torch.int64"),
    ({"values": torch.zeros(5)}, ValueError, r"values must have shape \(4,\) like rewards, got \(5,\)"),
    ({"values": torch.zeros(4, dtype=torch.int32)}, TypeError, "values must be floating point"),
    ({"cu_seqlens": None}, ValueError, r"rewards must have shape \[S, T\], or \[N\] with cu_seqlens, got \(4,\)"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"end at the token count 4, got \[0, 3\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, "never fall"),
    ({"cu_seqlens": torch.tensor([0.0, 4.0])}, ValueError, "cu_seqlens must be int32 or int64"),
    ({"mask": torch.ones(4)}, TypeError, r"mask must be bool, got torch.float32: pass mask.bool\(\)"),
    ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must have shape \(4,\) like rewards"),
    ({"gamma": 1.1}, ValueError, r"gamma must be a number in \[0, 1\], got 1.1"),
    ({"lam": NAN}, ValueError, r"lam must be a number in \[0, 1\], got nan"),
    ({"lam": "1"}, TypeError, "lam must be a number"),
    ({"last_values": torch.zeros(1)}, ValueError, r"last_values must have shape \[2\], one value per segment, got \(1,\)"),
    ({"last_values": torch.zeros(2, dtype=torch.long)}, TypeError, "last_values must be floating point"),
    ({"values": torch.zeros(4, device="meta")}, ValueError, "values is on meta"),
    ({"last_values": torch.zeros(2, device="meta")}, ValueError, "last_values is on meta"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_GAE)
def test_bad_input_of_gae_is_an_error_that_names_it(changes, error, message):
    arguments = {"rewards": torch.zeros(4), "values": torch.zeros(4), "cu_seqlens": torch.tensor([0, 1, 4]), **changes}
    with pytest.raises(error, match=message):
        gae(**arguments)


def test_padded_tokens_with_cu_seqlens_are_an_error():
    with pytest.raises(ValueError, match=r"rewards must have shape \[N\] with cu_seqlens, got \(2, 2\)"):
        gae(torch.zeros(2, 2), torch.zeros(2, 2), cu_seqlens=torch.tensor([0, 4]))
