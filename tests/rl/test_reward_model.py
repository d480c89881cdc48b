"""The reward model's loss against TRL's trainer, and pooling of last tokens."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitless.fused.rl.reward_model import BradleyTerryLoss, last_token_pool

from .tokens import F32, F64, NAN, ROUND, quick


def trl_reward_loss(rewards, margin, coefficient):
    """TRL's RewardTrainer.compute_loss itself, of a model that returns these scores. Loss and what it logs."""
    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    model = SimpleNamespace(training=True)
    self = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2, 2)} | ({} if margin is None else {"margin": margin})

    def forward(attention_mask, use_cache, margin=None):
        return SimpleNamespace(logits=rewards[:, None])

    loss = trainer.compute_loss(self, forward, inputs)
    logged = {name: values[0] for name, values in self._metrics["train"].items()}
    del logged["num_tokens"]
    return loss, logged


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_the_reward_loss_is_that_of_trl(coefficient, with_margin):
    g = torch.Generator().manual_seed(0)
    rewards = (3 * torch.randn(14, generator=g, dtype=F64)).requires_grad_()
    margin = torch.rand(7, generator=g, dtype=F64) if with_margin else None
    wanted, logged = trl_reward_loss(rewards, margin, coefficient)
    loss = BradleyTerryLoss(coefficient)
    for scores in ((rewards,), (rewards[:, None],), (rewards[:7], rewards[7:]), (rewards[:7, None], rewards[7:, None])):
        out = loss(*scores, margin=margin)
        torch.testing.assert_close(out.loss, wanted, rtol=1e-14, atol=0)
        (a,), (b,) = (torch.autograd.grad(value, rewards, retain_graph=True) for value in (out.loss, wanted))
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)
        assert set(out.metrics) == set(logged)
        for name, value in out.metrics.items():  # TRL counts in float32
            assert float(value) == pytest.approx(logged[name], rel=4 * ROUND[F32] if name == "accuracy" else 1e-14)
        assert torch.equal(out.margins, (rewards[:7] - rewards[7:]).detach())
        assert torch.equal(torch.cat([out.chosen_rewards, out.rejected_rewards]), rewards.detach())
        assert torch.equal(out.accuracy, out.metrics["accuracy"])
        assert not any(t.requires_grad for t in (out.margins, out.chosen_rewards, out.rejected_rewards, out.accuracy))


def test_the_reward_loss_is_differentiable_and_finite_for_any_rewards():
    rewards = torch.randn(6, dtype=F64, requires_grad=True)
    margin = torch.rand(3, dtype=F64, requires_grad=True)
    loss = BradleyTerryLoss(0.1)
    assert torch.autograd.gradcheck(lambda r, m: loss(r, margin=m).loss, (rewards, margin))
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    out = BradleyTerryLoss()(far)
    assert out.loss == 2e4 and torch.autograd.grad(out.loss, far)[0].tolist() == [-1, 1]


def test_equal_rewards_have_a_loss_of_ln_2_and_are_no_hit():
    out = BradleyTerryLoss()(torch.full((8,), 3.0, dtype=torch.bfloat16))
    assert out.loss.dtype == F32
    assert float(out.loss) == pytest.approx(math.log(2), rel=2 * ROUND[F32])
    assert out.accuracy == 0


def test_no_pairs_have_a_reward_loss_of_0():
    rewards = torch.zeros(0, requires_grad=True)
    out = BradleyTerryLoss(0.1)(rewards)
    assert out.loss == 0 and out.accuracy == 0
    assert out.metrics.keys() == BradleyTerryLoss()(torch.ones(2)).metrics.keys()
    assert all(value == 0 for value in out.metrics.values())
    assert torch.autograd.grad(out.loss, rewards)[0].shape == (0,)


BAD_REWARDS = [
    (([1.0, 2.0],), {}, TypeError, "rewards must be a torch.Tensor, got list"),
    ((torch.zeros(3),), {}, ValueError, "rewards must hold an even number of scores, chosen first .* got 3"),
    ((torch.zeros(2, 2),), {}, ValueError, r"rewards must have one score per sequence, shape \[S\] or \[S, 1\], got \(2, 2\)"),
    ((torch.zeros(2, dtype=torch.long),), {}, TypeError, "rewards must be floating point"),
    ((torch.zeros(2), torch.zeros(3)), {}, ValueError, r"rejected_rewards must have shape \(2,\) like rewards"),
    ((torch.zeros(4),), {"margin": torch.zeros(4)}, ValueError, r"margin must have shape \(2,\) like the chosen rewards"),
    ((torch.zeros(4),), {"margin": torch.zeros(2, dtype=torch.int32)}, TypeError, "margin must be floating point"),
]


@pytest.mark.parametrize(("scores", "options", "error", "message"), BAD_REWARDS)
def test_bad_rewards_are_an_error_that_names_them(scores, options, error, message):
    with pytest.raises(error, match=message):
        BradleyTerryLoss()(*scores, **options)


def test_bad_options_of_the_reward_loss():
    with pytest.raises(ValueError, match="center_rewards_coefficient must be a finite number"):
        BradleyTerryLoss(-1.0)
    with pytest.raises(TypeError, match="center_rewards_coefficient must be a number"):
        BradleyTerryLoss("0.1")


@quick(25)
@given(lengths=st.lists(st.integers(1, 6), max_size=6), left=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_the_last_token_is_found_whatever_the_layout(lengths, left):
    n = sum(lengths)
    packed = torch.arange(n * 3, dtype=F64).view(n, 3)
    bounds = [0, *itertools.accumulate(lengths)]
    wanted = packed[torch.tensor(bounds[1:], dtype=torch.long) - 1]
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(last_token_pool(packed, cu_seqlens=torch.tensor(bounds, dtype=dtype)), wanted)
    hidden = torch.full((len(lengths), 10, 3), NAN, dtype=F64)
    mask = torch.zeros(len(lengths), 10, dtype=torch.long)
    for j, (a, b) in enumerate(itertools.pairwise(bounds)):
        hidden[j, left[j] : left[j] + b - a] = packed[a:b]
        mask[j, left[j] : left[j] + b - a] = 1
    for attention_mask in (mask, mask.bool()):
        assert torch.equal(last_token_pool(hidden, attention_mask=attention_mask), wanted)
    assert torch.equal(last_token_pool(hidden[:, :4].nan_to_num()), hidden[:, 3].nan_to_num())


def test_only_last_tokens_have_a_gradient():
    hidden = torch.randn(2, 4, 3, dtype=F64, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda h: last_token_pool(h, attention_mask=mask), hidden)
    packed = torch.randn(5, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: last_token_pool(h, cu_seqlens=torch.tensor([0, 2, 5])), packed)
    dirty = hidden.detach().masked_fill((mask == 0)[..., None], NAN).requires_grad_()
    (grad,) = torch.autograd.grad(last_token_pool(dirty, attention_mask=mask).sum(), dirty)
    assert grad.sum() == 6 and grad[0, 2].tolist() == grad[1, 3].tolist() == [1, 1, 1]


def test_no_sequences_have_no_last_token():
    assert last_token_pool(torch.zeros(0, 3), cu_seqlens=torch.tensor([0])).shape == (0, 3)
    assert last_token_pool(torch.zeros(0, 5, 3)).shape == (0, 3)
    assert last_token_pool(torch.zeros(0, 0, 3)).shape == (0, 3)
    assert last_token_pool(torch.zeros(0, 5, 3), attention_mask=torch.zeros(0, 5, dtype=torch.long)).shape == (0, 3)


BAD_HIDDEN = [
    ((4, 3), {}, ValueError, r"hidden must have shape \[S, T, H\], or \[N, H\] with cu_seqlens, got \(4, 3\)"),
    ((2, 4, 3), {"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"hidden must have shape \[N, H\] with cu_seqlens"),
    ((4, 3), {"cu_seqlens": torch.tensor([0, 2, 2, 4])}, ValueError, "cu_seqlens must give each .* none for sequence 1"),
    ((4, 3), {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "end at the token count 4"),
    ((4, 3), {"cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.ones(1, 4)}, ValueError, "pass one of them"),
    ((2, 2, 3), {"attention_mask": torch.tensor([[1, 1], [0, 0]])}, ValueError, "attention_mask must .* none for sequence 1"),
    ((2, 2, 3), {"attention_mask": torch.ones(2, 2)}, TypeError, "attention_mask must be bool or integers, got torch.float32"),
    ((2, 2, 3), {"attention_mask": torch.ones(2, 3).long()}, ValueError, r"attention_mask must have shape \(2, 2\) like"),
    ((2, 2, 3), {"attention_mask": [[1, 1], [1, 1]]}, TypeError, "attention_mask must be a torch.Tensor, got list"),
    ((2, 0, 3), {}, ValueError, r"hidden must give each sequence a token, got shape \(2, 0, 3\)"),
    ((2, 0, 3), {"attention_mask": torch.ones(2, 0).long()}, ValueError, "attention_mask must .* none for sequence 0"),
]


@pytest.mark.parametrize(("shape", "options", "error", "message"), BAD_HIDDEN)
def test_bad_input_of_last_token_pool_is_an_error_that_names_it(shape, options, error, message):
    with pytest.raises(error, match=message):
        last_token_pool(torch.zeros(shape), **options)
