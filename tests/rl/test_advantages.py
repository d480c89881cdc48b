"""Advantages from rewards against the formulas of TRL 1.16, verl and OpenRLHF, written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitless.fused.rl.advantages import (
    group_advantages,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
)

from .tokens import F32, F64, NAN, ROUND, quick, some_mask


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


@quick()
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
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"rewards must have shape \[1\], one value per segment, got \(2,\)"),
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
