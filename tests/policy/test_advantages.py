"""Advantages: GAE against a loop in float64, the others against the formulas of TRL 1.16, verl and OpenRLHF, written out."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from logitless.fused.rl.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
)
from logitless.fused.rl.gae import GAE, gae
from logitless.fused.rl.kl import KL_ESTIMATORS, kl_estimate
from logitless.fused.rl.masked import masked_mean, masked_var, masked_whiten
from logitless.fused.rl.value_tracker import ValueTracker

F32, F64 = torch.float32, torch.float64
NAN, INF = math.nan, math.inf
#: Relative error of one rounding.
ROUND = {F32: 2**-24, F64: 2**-53}
quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
lengths_of_any_kind = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 7, 63, 64, 65, 130]), max_size=7)
decays = st.sampled_from([(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.0, 0.5), (0.7, 0.0)])


def naive_gae(rewards, values, bounds, gamma, lam, mask=None, last_values=None):
    """Advantages, returns and, for errors, the same sum of absolute values; packed, float64, token by token. Each (N,)."""
    r, v = rewards.double().tolist(), values.double().tolist()
    advantages, returns, size = ([0.0] * len(r) for _ in range(3))
    for j, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        following = 0.0 if last_values is None else float(last_values[j])
        advantage = absolute = 0.0
        for t in range(stop - 1, start - 1, -1):
            if mask is not None and not mask[t]:
                continue
            advantage = r[t] + gamma * following - v[t] + gamma * lam * advantage
            absolute = abs(r[t]) + abs(following) + abs(v[t]) + gamma * lam * absolute
            following = v[t]
            advantages[t], returns[t], size[t] = advantage, advantage + v[t], absolute + abs(v[t])
    return tuple(torch.tensor(x, dtype=F64) for x in (advantages, returns, size))


def gae_limit(expected, size, dtype):
    """One rounding to the result's type, and some in float64 of what was added."""
    return 1.01 * ROUND[dtype] * expected.abs() + 64 * ROUND[F64] * size


def some_tokens(lengths, *, holes=0.0, seed=0, dtype=F32):
    """Rewards, values, bounds and a mask, packed."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    mask = torch.rand(n, generator=g) >= holes if holes else None
    rewards, values = (torch.randn(n, generator=g, dtype=F64).to(dtype) for _ in range(2))
    return rewards, values, [0, *itertools.accumulate(lengths)], mask


def padded(packed, bounds, *, fill=0.0, left=False):
    """(N,) -> (S, T)."""
    width = max([b - a for a, b in itertools.pairwise(bounds)], default=0)
    out = packed.new_full((len(bounds) - 1, width), fill)
    for j, (a, b) in enumerate(itertools.pairwise(bounds)):
        out[j, slice(width - (b - a), width) if left else slice(0, b - a)] = packed[a:b]
    return out


def check_gae(got, wanted, dtype):
    for tensor, expected in zip(got, wanted[:2], strict=True):
        assert tensor.dtype == dtype
        assert not tensor.requires_grad
        assert ((tensor.double() - expected).abs() <= gae_limit(expected, wanted[2], dtype)).all()


@quick
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
    ({"last_values": torch.zeros(1)}, ValueError, r"last_values must have shape \[2\], one value a segment, got \(1,\)"),
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


def nanstd(x, dim=None):
    """TRL 1.16's."""
    mean = torch.nanmean(x, dim=dim, keepdim=True)
    count = (~x.isnan()).sum(dim=dim, keepdim=True).double()  # TRL: the quotient is float32
    correction = torch.where(count > 1, count / (count - 1), NAN)
    return (torch.nanmean((x - mean) ** 2, dim=dim, keepdim=True) * correction).sqrt()


def trl_grpo(rewards, size, scale):
    """The advantages of TRL 1.16's GRPOTrainer, in its words."""
    grouped = rewards.view(-1, size)
    advantages = rewards - torch.nanmean(grouped, dim=1).repeat_interleave(size)
    if scale == "group":
        advantages = advantages / (nanstd(grouped, 1)[:, 0].repeat_interleave(size) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(rewards).squeeze() + 1e-4)
    return advantages.nan_to_num(nan=0.0)


def trl_rloo(rewards, size, normalize):
    """Those of its RLOOTrainer."""
    grouped = rewards.view(-1, size)
    count = (~grouped.isnan()).sum(1, keepdim=True)
    advantages = rewards - ((torch.nansum(grouped, 1, keepdim=True) - grouped) / (count - 1)).view(-1)
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (nanstd(advantages).squeeze() + 1e-4)
    return advantages.nan_to_num(nan=0.0)


def some_rewards(prompts, size, unscored, dtype=F64):
    g = torch.Generator().manual_seed(prompts * 10 + size)
    rewards = torch.randn(prompts * size, generator=g, dtype=F64).to(dtype)
    if unscored:
        rewards[torch.rand(len(rewards), generator=g) < 0.3] = NAN
        rewards[1:size] = NAN  # one that is alone
        rewards[size : 2 * size] = NAN  # none
        rewards[2 * size : 3 * size] = 0.5  # all alike
    return rewards


@pytest.mark.parametrize("unscored", [False, True])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trl(scale, size, unscored):
    rewards = some_rewards(6, size, unscored)
    wanted = trl_grpo(rewards, size, scale)
    got = group_advantages(rewards, group_size=size, scale_rewards=scale)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    single = group_advantages(rewards.float(), group_size=size, scale_rewards=scale)
    assert single.dtype == F32
    torch.testing.assert_close(single, trl_grpo(rewards.float().double(), size, scale).float(), rtol=2 * ROUND[F32], atol=1e-12)


@pytest.mark.parametrize("unscored", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [2, 5])
def test_leave_one_out_advantages_are_those_of_trl(size, normalize, unscored):
    rewards = some_rewards(6, size, unscored)
    wanted = trl_rloo(rewards, size, normalize)
    got = leave_one_out_advantages(rewards, group_size=size, normalize=normalize)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.randn(7, dtype=F64)
    ids = torch.tensor([3, -1, 3, 8, -1, 3, 8])
    got = leave_one_out_advantages(rewards, group_ids=ids)
    for i in range(7):
        others = [rewards[j] for j in range(7) if j != i and ids[j] == ids[i]]
        assert float(got[i]) == pytest.approx(float(rewards[i] - sum(others) / len(others)), abs=1e-14)


@quick
@given(ids=st.lists(st.integers(-2, 2), min_size=1, max_size=20), seed=st.integers(0, 9))
def test_group_ids_in_any_order_are_groups(ids, seed):
    """Each group alone, as one of some size, gives the same bits."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([*ids, *ids])[torch.randperm(2 * len(ids), generator=g)]
    rewards = torch.randn(len(ids), generator=g)
    for function in (group_advantages, leave_one_out_advantages):
        got = function(rewards, group_ids=ids)
        for one in ids.unique():
            members = ids == one
            assert torch.equal(got[members], function(rewards[members], group_size=int(members.sum())))


def test_equal_rewards_have_advantage_exactly_0():
    rewards = torch.full((12,), 0.1)
    assert (group_advantages(rewards, group_size=3) == 0).all()
    assert (group_advantages(rewards, group_size=3, scale_rewards="batch") == 0).all()
    assert (leave_one_out_advantages(rewards, group_size=3, normalize=True) == 0).all()


@pytest.mark.parametrize("function", [group_advantages, leave_one_out_advantages])
def test_no_sequences_have_no_advantages(function):
    assert function(torch.zeros(0), group_size=4).shape == (0,)
    assert function(torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_groups_of_one_have_advantage_0_where_no_deviation_is_asked_for():
    rewards = torch.tensor([1.0, 5.0])
    assert group_advantages(rewards, group_size=1, scale_rewards="none").tolist() == [0, 0]
    assert group_advantages(rewards, group_size=1, scale_rewards="batch").tolist() == [0, 0]


BAD_GROUPS = [
    ({}, ValueError, "exactly one of group_size and group_ids must be given, got neither"),
    ({"group_size": 2, "group_ids": torch.zeros(4, dtype=torch.long)}, ValueError, "got both"),
    ({"group_size": 3}, ValueError, "group_size must be at least 1 and divide the number of rewards, 4, got 3"),
    ({"group_size": 0}, ValueError, "group_size must be at least 1"),
    ({"group_size": 2.0}, TypeError, "group_size must be an int, got 2.0"),
    ({"group_size": 1}, ValueError, "group_size must be at least 2 for .*, got 1"),
    ({"group_ids": torch.tensor([0, 0, 7, 1])}, ValueError, "group_ids must have at least 2 .* got one of group 1"),
    ({"group_ids": torch.zeros(3, dtype=torch.long)}, ValueError, r"group_ids must have shape \[4\] like rewards, got \(3,\)"),
    ({"group_ids": torch.zeros(4)}, TypeError, "group_ids must be integers, got torch.float32"),
    ({"group_ids": [0, 0, 1, 1]}, TypeError, "group_ids must be a torch.Tensor, got list"),
    ({"group_size": 2, "eps": 0.0}, ValueError, "eps must be a finite number"),
    ({"group_size": 2, "rewards": torch.zeros(2, 2)}, ValueError, r"rewards must have shape \[S\]"),
    ({"group_size": 2, "rewards": torch.zeros(4, dtype=torch.int64)}, TypeError, "rewards must be floating point"),
]


@pytest.mark.parametrize("function", [group_advantages, leave_one_out_advantages])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_GROUPS)
def test_bad_groups_are_an_error_that_names_them(function, changes, error, message):
    arguments = {"rewards": torch.zeros(4), **changes}
    with pytest.raises(error, match=message):
        function(arguments.pop("rewards"), **arguments)


def test_bad_options_of_group_advantages():
    with pytest.raises(ValueError, match=r"scale_rewards must be one of \['batch', 'group', 'none'\], got 'std'"):
        group_advantages(torch.zeros(4), group_size=2, scale_rewards="std")
    with pytest.raises(ValueError, match="rewards must hold at least 2 values for scale_rewards='batch'"):
        group_advantages(torch.zeros(1), group_size=1, scale_rewards="batch")
    with pytest.raises(TypeError, match="normalize must be a bool"):
        leave_one_out_advantages(torch.zeros(4), group_size=2, normalize=1)


def some_mask(seed=0, sequences=5, width=11):
    """Right-padded sequences of 1 to ``width`` tokens."""
    lengths = torch.randint(1, width + 1, (sequences,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(width) < lengths[:, None]


def verl_whiten(values, mask):
    n = mask.sum().double()
    mean = (values * mask).sum() / n
    variance = ((values - mean) ** 2 * mask).sum() / n * (n / (n - 1))
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_reinforce_plus_plus_is_that_of_verl(gamma, kl_coef):
    g = torch.Generator().manual_seed(1)
    mask = some_mask()
    rewards, kl = torch.randn(5, generator=g, dtype=F64), torch.randn(5, 11, generator=g, dtype=F64)
    shaped = -kl_coef * kl * mask
    shaped[torch.arange(5), mask.sum(1) - 1] += rewards
    running, returns = torch.zeros(5, dtype=F64), torch.zeros(5, 11, dtype=F64)
    for t in reversed(range(11)):
        running = shaped[:, t] + gamma * running
        returns[:, t] = running
        running = running * mask[:, t]
    extra = {"token_rewards": (-kl_coef * kl).masked_fill(~mask, NAN)} if kl_coef else {}
    got = reinforce_plus_plus_advantages(rewards, mask=mask, gamma=gamma, **extra)
    torch.testing.assert_close(got, verl_whiten(returns, mask), rtol=1e-12, atol=1e-12)
    plain = reinforce_plus_plus_advantages(rewards, mask=mask, gamma=gamma, whiten=False, **extra)
    torch.testing.assert_close(plain, returns * mask, rtol=1e-12, atol=1e-12)
    offsets = torch.tensor([0, *itertools.accumulate(mask.sum(1).tolist())])
    if extra:
        extra = {"token_rewards": extra["token_rewards"][mask]}
    packed = reinforce_plus_plus_advantages(rewards, cu_seqlens=offsets, gamma=gamma, **extra)
    torch.testing.assert_close(packed, got[mask], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("by_ids", [False, True])
def test_reinforce_plus_plus_baseline_is_that_of_verl(by_ids):
    mask = some_mask(sequences=6)
    rewards = torch.randn(6, dtype=F64)
    index = torch.tensor([2, 0, 2, 1, 0, 1]) if by_ids else torch.arange(6) // 2
    scores = rewards.clone()
    for i in range(6):
        scores[i] -= rewards[index == index[i]].mean()
    wanted = verl_whiten(scores[:, None].tile(1, 11) * mask, mask)
    groups = {"group_ids": index} if by_ids else {"group_size": 2}
    got = reinforce_plus_plus_advantages(rewards, mask=mask, baseline="group", **groups)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_reinforce_plus_plus_baseline_with_token_rewards_is_that_of_openrlhf():
    """Group means come off the sequences' rewards, then the penalty goes on the tokens, then returns are added up."""
    g = torch.Generator().manual_seed(2)
    mask, gamma = some_mask(sequences=4), 0.9
    rewards, penalty = torch.randn(4, generator=g, dtype=F64), torch.randn(4, 11, generator=g, dtype=F64)
    centered = (rewards.view(2, 2) - rewards.view(2, 2).mean(-1, keepdim=True)).view(-1)
    shaped = torch.where(mask, penalty, 0)
    shaped[torch.arange(4), mask.sum(1) - 1] += centered
    returns, cumulative = torch.zeros_like(shaped), torch.zeros(4, dtype=F64)
    for t in reversed(range(11)):
        cumulative = shaped[:, t] + gamma * cumulative
        returns[:, t] = cumulative
    got = reinforce_plus_plus_advantages(
        rewards, mask=mask, token_rewards=penalty, gamma=gamma, baseline="group", group_size=2, whiten=False
    )
    torch.testing.assert_close(got, returns * mask, rtol=1e-12, atol=1e-12)


def test_a_sequence_that_nothing_scored_has_advantage_0_and_whitens_nothing():
    rewards = torch.tensor([1.0, NAN, 2.0, 4.0], dtype=F64)
    offsets, kept = torch.tensor([0, 2, 5, 6, 9]), torch.tensor([0, 1, 5, 6, 7, 8])
    got = reinforce_plus_plus_advantages(rewards, cu_seqlens=offsets, gamma=0.9)
    without = reinforce_plus_plus_advantages(rewards[[0, 2, 3]], cu_seqlens=torch.tensor([0, 2, 3, 6]), gamma=0.9)
    assert (got[2:5] == 0).all()
    torch.testing.assert_close(got[kept], without, rtol=1e-14, atol=1e-14)
    centered = reinforce_plus_plus_advantages(rewards, cu_seqlens=offsets, baseline="group", group_size=2, whiten=False)
    assert centered.tolist() == [0, 0, 0, 0, 0, -1, 1, 1, 1]


def test_a_masked_token_of_reinforce_plus_plus_does_not_exist():
    rewards, mask = torch.tensor([1.0, 2.0]), torch.tensor([[True, False, True, True], [True, True, False, False]])
    tokens = torch.where(mask, torch.arange(8.0).view(2, 4), NAN)
    got = reinforce_plus_plus_advantages(rewards, mask=mask, token_rewards=tokens, gamma=0.5, whiten=False)
    first, second = [0 + 0.5 * (2 + 0.5 * 4), 0, 2 + 0.5 * 4, 3 + 1], [4 + 0.5 * 7, 5 + 2, 0, 0]
    assert got.tolist() == [first, second]


BAD_REINFORCE = [
    ({"cu_seqlens": None}, ValueError, "cu_seqlens, mask or token_rewards must be given"),
    ({"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, "never fall"),
    ({"cu_seqlens": torch.tensor([[0, 3], [1, 2]])}, ValueError, "cu_seqlens must be int32 or int64 of shape"),
    ({"cu_seqlens": [0, 2, 4]}, TypeError, "cu_seqlens must be a torch.Tensor"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"rewards must have shape \[1\], one value a segment, got \(2,\)"),
    ({"token_rewards": torch.zeros(5)}, ValueError, "end at the token count 5"),
    ({"mask": torch.ones(4)}, TypeError, "mask must be bool"),
    ({"mask": torch.tensor([True, False, False, False])}, ValueError, "mask must leave at least 2 tokens .* got 1"),
    ({"cu_seqlens": torch.tensor([0, 0, 1])}, ValueError, "cu_seqlens must hold at least 2 tokens .* got 1"),
    ({"baseline": "mean"}, ValueError, r"baseline must be one of \['group', 'none'\], got 'mean'"),
    ({"baseline": "group"}, ValueError, "exactly one of group_size and group_ids must be given, got neither"),
    ({"baseline": "group", "group_size": 1}, ValueError, "group_size must be at least 2 for baseline='group', got 1"),
    ({"group_size": 2}, ValueError, "group_size is given, but baseline='none' has no groups"),
    ({"group_ids": torch.tensor([0, 0])}, ValueError, "group_ids is given, but"),
    ({"gamma": -0.1}, ValueError, "gamma must be a number in"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_REINFORCE)
def test_bad_input_of_reinforce_plus_plus_is_an_error_that_names_it(changes, error, message):
    with pytest.raises(error, match=message):
        reinforce_plus_plus_advantages(torch.zeros(2), **{"cu_seqlens": torch.tensor([0, 2, 4]), **changes})


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


def test_kl_estimates_of_16_bits_are_float32_and_an_overflow_spoils_no_gradient():
    assert kl_estimate(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), "k2").dtype == F32
    logps = torch.tensor([-200.0, -1.0], requires_grad=True)
    out = kl_estimate(logps, torch.tensor([0.0, -1.0]), "k3")
    (grad,) = torch.autograd.grad(out.sum(), logps)
    assert out.tolist() == [INF, 0] and grad.tolist() == [-INF, 0]


def test_bad_input_of_kl_estimate():
    with pytest.raises(ValueError, match=r"estimator must be one of \['k1', 'k2', 'k3'\], got 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="ref_logps must have shape"):
        kl_estimate(torch.zeros(2), torch.zeros(3))


@quick
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


def beta_tracker(start, batches, half_life, low, high):
    """SPO's tracker in its own terms, one prompt: Beta parameters. Yields baselines."""
    n = 1 / (1 - low)
    alpha, beta = n * start, n * (1 - start)
    for reward, kl in batches:
        yield alpha / (alpha + beta), alpha + beta
        rho = min(high, max(low, 2 ** (-kl / half_life)))
        alpha, beta = rho * alpha + reward, rho * beta + 1 - reward


def test_the_value_tracker_is_a_beta_distribution_that_forgets():
    batches = [(1.0, 0.0), (0.0, 0.01), (1.0, 0.006), (1.0, 1.0), (0.25, 0.004), (0.0, 0.05)]
    tracker = ValueTracker(half_life=0.06)
    tracker.initialize(["a"], torch.tensor([0.25]))
    for (reward, kl), (value, count) in zip(batches, beta_tracker(0.25, batches, 0.06, 0.875, 0.96), strict=True):
        assert float(tracker.values(["a"])) == pytest.approx(value, rel=1e-6)
        assert float(tracker.counts(["a"])) == pytest.approx(count, rel=1e-6)
        rewards, divergence = torch.tensor([reward], dtype=F64), torch.tensor([kl], dtype=F64)
        got = tracker.advantages(["a"], rewards, kl=divergence, whiten=False)
        assert float(got) == pytest.approx(reward - value, abs=1e-12)


def test_the_value_tracker_whitens_over_the_batch_with_values_from_before_it():
    tracker = ValueTracker()
    tracker.initialize(["a", "b"], torch.tensor([0.9, 0.1], dtype=F64))
    rewards = torch.tensor([1.0, 1.0, NAN, 0.0], dtype=F64)
    got = tracker.advantages(["a", "b", "a", "c"], rewards)
    raw = torch.tensor([0.1, 0.9, -0.5], dtype=F64)
    torch.testing.assert_close(got[[0, 1, 3]], (raw - raw.mean()) / (raw.var() + 1e-8).sqrt(), rtol=1e-12, atol=1e-12)
    assert got[2] == 0 and "c" in tracker and len(tracker) == 3
    assert float(tracker.counts(["a"])) == pytest.approx(0.96 * 8 + 1)  # not that of the sequence without a score


def test_the_value_tracker_counts_a_prompt_once_for_each_sequence_in_any_order():
    rewards, kl = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.02, 0.01])
    trackers = [ValueTracker(half_life=0.1), ValueTracker(half_life=0.1)]
    trackers[0].advantages([7, 7, 7], rewards, kl=kl)
    trackers[1].advantages(torch.tensor([7, 7, 7]), rewards.flip(0), kl=kl.flip(0))
    rho = 2**-0.1
    for tracker in trackers:
        assert float(tracker.values([7])) == pytest.approx((rho * 8 * 0.5 + 2) / (rho * 8 + 3), rel=1e-6)
        assert float(tracker.counts([7])) == pytest.approx(rho * 8 + 3, rel=1e-6)


def test_the_value_tracker_can_be_saved_and_left_as_it_is(tmp_path):
    tracker = ValueTracker()
    keys, rewards = ["a", 3, ("b", 1)], torch.tensor([1.0, 0.0, 0.5])
    tracker.advantages(keys, rewards)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    other = ValueTracker()
    other.advantages(["gone"], torch.tensor([1.0]), whiten=False)
    other.load_state_dict(torch.load(tmp_path / "tracker.pt"))
    assert "gone" not in other and len(other) == 3
    assert torch.equal(other.advantages(keys, rewards, update=False), tracker.advantages(keys, rewards, update=False))
    assert torch.equal(other.advantages(keys, rewards), tracker.advantages(keys, rewards))
    assert torch.equal(other.values(keys), tracker.values(keys))
    assert torch.equal(other.counts(keys), tracker.counts(keys))


def test_bad_input_of_the_value_tracker():
    for changes, message in (
        ({"half_life": 0}, "half_life must be a finite number"),
        ({"rho_min": -0.1}, "rho_min must be a finite number"),
        ({"rho_min": 1, "rho_max": 1}, "rho_min must be below 1"),
        ({"rho_max": 0.5}, "rho_max must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            ValueTracker(**changes)
    tracker, two = ValueTracker(), torch.zeros(2)
    for arguments, options, error, message in (
        (("ab", two), {}, TypeError, "keys must be a sequence of prompts' keys"),
        ((torch.zeros(2), two), {}, TypeError, "keys must be a sequence, or a tensor of integers"),
        ((["a"], two), {}, ValueError, r"rewards must have shape \[1\]"),
        ((["a"], torch.zeros(1)), {}, ValueError, "rewards must hold at least 2 values that are not NaN"),
        ((["a", "b"], two), {"kl": torch.tensor([0.0, -1.0])}, ValueError, "kl must not be negative or NaN"),
        ((["a", "b"], two), {"kl": two, "update": False}, ValueError, "kl is given, but update=False"),
        ((["a", "b"], two), {"kl": torch.zeros(3)}, ValueError, r"kl must have shape \[2\]"),
    ):
        with pytest.raises(error, match=message):
            tracker.advantages(*arguments, **options)
    assert len(tracker) == 0
    with pytest.raises(ValueError, match="values must be a finite number"):
        tracker.initialize(["a"], torch.tensor([NAN]))
    with pytest.raises(ValueError, match="state_dict must have exactly keys, values and counts, got"):
        tracker.load_state_dict({"keys": []})


def test_keys_that_are_tensors_are_told_apart_by_their_values():
    tracker = ValueTracker()
    for _ in range(3):
        tracker.advantages([torch.tensor(7), torch.tensor(9)], torch.tensor([1.0, 0.0]))
    assert len(tracker) == 2 and 7 in tracker
    with pytest.raises(TypeError, match="hashable by value"):
        tracker.advantages([torch.ones(2), torch.ones(2)], torch.tensor([1.0, 0.0]))
