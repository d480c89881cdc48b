"""Advantages from rewards alone: group-relative, leave-one-out and REINFORCE++; and rewards shaped by a KL penalty.

A *group* is the set of sequences sampled for one prompt. In functions that return advantages, a reward of NaN marks a sequence
without a score: it is left out of every mean, and its advantage is 0, as in TRL. Results carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.kernels.core.checks import check_tensor
from logitless.kernels.sequence_logps import segment_sum

from ..checks import check_bool, check_choice, check_number
from .checks import check_float, check_like, check_one_each, check_rate
from .gae import gae
from .kl import KL_ESTIMATORS, kl_estimate
from .masked import masked_whiten
from .segments import Segments

SCALES = ("group", "batch", "none")
BASELINES = ("none", "group")


def _check_rewards(rewards: object) -> None:
    check_float("rewards", rewards)
    assert isinstance(rewards, Tensor)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [S], one value per sequence, got {tuple(rewards.shape)}")


def _dtype(rewards: Tensor) -> torch.dtype:
    return torch.promote_types(rewards.dtype, torch.float32)


class _Groups:
    """Which sequences were sampled for the same prompt."""

    def __init__(self, rewards: Tensor, group_size: int | None, group_ids: Tensor | None, *, pairs: str | None) -> None:
        """``pairs``: the option that needs at least two sequences per group, for the error message; None: no option does."""
        if (group_size is None) == (group_ids is None):
            given = "neither" if group_size is None else "both"
            raise ValueError(f"exactly one of group_size and group_ids must be given, got {given}")
        count = len(rewards)
        if group_ids is None:
            if isinstance(group_size, bool) or not isinstance(group_size, int):
                raise TypeError(f"group_size must be an int, got {group_size!r}")
            if group_size < 1 or count % group_size:
                raise ValueError(f"group_size must be at least 1 and divide the number of rewards, {count}, got {group_size}")
            if pairs and group_size == 1:
                raise ValueError(f"group_size must be at least 2 for {pairs}, got 1")
            self.order = None
            self.index = torch.arange(count, device=rewards.device) // group_size
            self.sizes = torch.full((count // group_size,), group_size, device=rewards.device)
        else:
            if not isinstance(group_ids, Tensor):
                raise TypeError(f"group_ids must be a torch.Tensor, got {type(group_ids).__name__}")
            if group_ids.is_floating_point() or group_ids.dtype in (torch.bool, torch.complex64, torch.complex128):
                raise TypeError(f"group_ids must be integers, got {group_ids.dtype}")
            if tuple(group_ids.shape) != (count,):
                raise ValueError(f"group_ids must have shape [{count}] like rewards, got {tuple(group_ids.shape)}")
            if group_ids.device != rewards.device:
                raise ValueError(f"group_ids is on {group_ids.device} but rewards is on {rewards.device}: move one of them")
            ids, self.index, self.sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
            self.order = self.index.argsort(stable=True)
            if pairs and bool((alone := self.sizes == 1).any()):
                raise ValueError(
                    f"group_ids must have at least 2 sequences per group for {pairs}, got one of group {int(ids[alone][0])}"
                )
        self.offsets = torch.cat([self.sizes.new_zeros(1), self.sizes.cumsum(0)])

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each sequence's group, (S,); added in a fixed order, so bitwise repeatable."""
        return segment_sum(values if self.order is None else values[self.order], self.offsets)[self.index]


def _scored(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards in float64 with 0 in place of NaN, and a mask of those that are not NaN."""
    scored = ~rewards.isnan()
    return torch.where(scored, rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64), 0), scored


def _std(centered: Tensor, total: Tensor, squares: Tensor | None = None) -> Tensor:
    """Standard deviation with Bessel's correction; 0 for fewer than two values."""
    squares = centered.square().sum() if squares is None else squares
    return (squares / (total - 1).clamp(min=1)).sqrt()


@torch.no_grad()
def group_advantages(
    rewards: Tensor,  # (S,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (S,)
    scale_rewards: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Group-relative advantages of GRPO, https://huggingface.co/papers/2402.03300, as TRL 1.16 computes them:
    ``(reward - mean of its group) / (std + eps)``.

    Args:
        rewards: one per sequence, floating point. NaN: the sequence has no score.
        group_size: number of sequences per prompt; they are adjacent (TRL's ``num_generations``).
        group_ids: alternatively, integers that are equal for sequences of the same prompt, in any order.
        scale_rewards: the standard deviation to divide by (with Bessel's correction): that of the ``"group"``, that of the
            ``"batch"`` (https://huggingface.co/papers/2508.08221), or ``"none"`` (Dr. GRPO,
            https://huggingface.co/papers/2503.20783).
        eps: added to the standard deviation.

    Returns:
        Tensor: (S,) in the rewards' dtype, at least float32.

    Raises:
        TypeError, ValueError: naming the argument; for a group or batch of one whose standard deviation is needed.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 1.0]), group_size=2, scale_rewards="none")
        tensor([ 0.5000, -0.5000,  1.0000, -1.0000])
    """
    _check_rewards(rewards)
    check_choice("scale_rewards", scale_rewards, SCALES)
    eps = check_number("eps", eps, 0, open_low=True)
    groups = _Groups(rewards, group_size, group_ids, pairs="scale_rewards='group'" if scale_rewards == "group" else None)
    if scale_rewards == "batch" and len(rewards) == 1:
        raise ValueError("rewards must hold at least 2 values for scale_rewards='batch', got 1")
    values, scored = _scored(rewards)
    total = groups.sums(scored.to(values.dtype))
    advantages = torch.where(scored, values - groups.sums(values) / total.clamp(min=1), 0)
    if scale_rewards == "group":
        advantages = advantages / (_std(advantages, total, groups.sums(advantages.square())) + eps)
    elif scale_rewards == "batch":
        count = scored.sum()
        centered = torch.where(scored, values - values.sum() / count.clamp(min=1), 0)
        advantages = advantages / (_std(centered, count) + eps)
    return advantages.to(_dtype(rewards))


@torch.no_grad()
def leave_one_out_advantages(
    rewards: Tensor,  # (S,)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (S,)
    normalize: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Leave-one-out advantages of RLOO, https://huggingface.co/papers/2402.14740, as TRL 1.16 computes them: the reward minus
    the mean reward of the other sequences of its group.

    If none of the other sequences has a score, the advantage is 0.

    Args:
        rewards: one per sequence, floating point, with the KL penalty included. NaN: the sequence has no score.
        group_size, group_ids: as for :func:`group_advantages`; at least two sequences per group.
        normalize: afterwards subtract the mean of the batch and divide by its standard deviation plus ``eps`` (TRL's
            ``normalize_advantages``).
        eps: added to the standard deviation.

    Returns:
        Tensor: (S,) in the rewards' dtype, at least float32.

    Raises:
        TypeError, ValueError: naming the argument; for a group of one.

    Example:
        >>> leave_one_out_advantages(torch.tensor([1.0, 0.0, 2.0]), group_size=3)
        tensor([ 0.0000, -1.5000,  1.5000])
    """
    _check_rewards(rewards)
    check_bool("normalize", normalize)
    eps = check_number("eps", eps, 0, open_low=True)
    groups = _Groups(rewards, group_size, group_ids, pairs="a leave-one-out mean")
    values, scored = _scored(rewards)
    total = groups.sums(scored.to(values.dtype))
    known = scored & (total > 1)
    advantages = torch.where(known, values - (groups.sums(values) - values) / (total - 1).clamp(min=1), 0)
    if normalize:
        count = known.sum()
        centered = torch.where(known, advantages - advantages.sum() / count.clamp(min=1), 0)
        advantages = centered / (_std(centered, count) + eps)
    return advantages.to(_dtype(rewards))


def _token_rewards(rewards: Tensor, segments: Segments, of_tokens: Tensor | None) -> Tensor:
    """Rewards of the kept tokens in float64: those given, plus the sequence's reward at its last token. (N',)"""
    wide = torch.float32 if rewards.device.type == "mps" else torch.float64
    filled, last = segments.last
    if of_tokens is None:
        packed = torch.zeros(int(segments.offsets[-1]), dtype=wide, device=rewards.device)
    else:
        packed = segments.pack(of_tokens).to(wide, copy=True)
    packed[last] += rewards[filled].to(wide)
    return packed


@torch.no_grad()
def kl_shaped_rewards(
    rewards: Tensor,  # (S,)
    logps: Tensor,  # (N,) with cu_seqlens, or (S, T)
    ref_logps: Tensor,  # like logps
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    mask: Tensor | None = None,  # like logps, bool
    kl_coef: float,
    kl_estimator: str = "k1",
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Token rewards: the KL penalty ``-kl_coef * kl`` at each token, plus the sequence's reward at its last token.

    The rewards of PPO from human feedback, https://huggingface.co/papers/1909.08593 eq. 2; ``compute_reward`` of OpenRLHF.
    The reward of a sequence without tokens is dropped.

    Args:
        rewards: one per sequence, floating point.
        logps: log-probabilities under the sampling policy; padded ``[S, T]``, or packed ``[N]`` with ``cu_seqlens``.
        ref_logps: log-probabilities under the reference.
        cu_seqlens: int32 or int64, where each packed sequence starts and ends.
        mask: the tokens to keep. Values at other positions are ignored, NaN included.
        kl_coef: weight of the penalty, not negative.
        kl_estimator: one of :data:`logitless.rl.KL_ESTIMATORS`; ``"k3"`` is bounded as in :func:`kl_estimate`.
        reward_clip_range: clamp the sequence rewards, but not the penalty, to this range first.

    Returns:
        Tensor: shaped like ``logps``, in the dtype that holds both, at least float32; 0 at masked positions.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> logps, ref_logps = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-2.0, -1.0, -2.0])
        >>> kl_shaped_rewards(torch.tensor([1.0, 5.0]), logps, ref_logps, cu_seqlens=torch.tensor([0, 2, 3]), kl_coef=0.1)
        tensor([-0.1000,  1.0000,  5.0000])
    """
    check_float("logps", logps)
    check_like("ref_logps", ref_logps, logps, "logps")
    segments = Segments.of("logps", logps, cu_seqlens, mask)
    check_one_each("rewards", rewards, segments.count, logps.device)
    kl_coef = check_number("kl_coef", kl_coef, 0)
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    if reward_clip_range is not None:
        if not isinstance(reward_clip_range, (tuple, list)) or len(reward_clip_range) != 2:
            raise TypeError(f"reward_clip_range must be a pair (low, high), got {reward_clip_range!r}")
        low = check_number("reward_clip_range[0]", reward_clip_range[0])
        rewards = rewards.clamp(low, check_number("reward_clip_range[1]", reward_clip_range[1], low))
    kl = kl_estimate(logps, ref_logps, kl_estimator)  # may be NaN at masked tokens
    packed = _token_rewards(rewards, segments, -kl_coef * kl)
    return segments.unpack(packed.to(torch.promote_types(kl.dtype, rewards.dtype)))


@torch.no_grad()
def reinforce_plus_plus_advantages(
    rewards: Tensor,  # (S,)
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    mask: Tensor | None = None,  # (S, T), or (N,) with cu_seqlens; bool
    token_rewards: Tensor | None = None,  # (S, T), or (N,) with cu_seqlens
    gamma: float = 1.0,
    baseline: str = "none",
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (S,)
    whiten: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Advantages of REINFORCE++, https://huggingface.co/papers/2501.03262: returns of tokens, whitened over the batch.

    The return of a token is the discounted sum of rewards from that token to the end of its sequence: ``token_rewards``, plus
    the sequence's reward at its last token. ``baseline="group"`` (REINFORCE++-baseline) first subtracts the group mean from
    each sequence's reward. Whitening uses all tokens of this call.

    Without masked tokens inside a sequence, the result equals verl's ``compute_reinforce_plus_plus_outcome_advantage``, and
    with ``gamma=1`` and no ``token_rewards`` its ``..._baseline_outcome_advantage``. Two differences remain: verl ends a return
    at a masked token, and subtracts the baseline from a sequence's token rewards as well. Here masked tokens are skipped, and
    a token is credited with the rewards that follow it, as in OpenRLHF.

    Args:
        rewards: one per sequence, floating point. The reward of a sequence without tokens counts only in its group mean.
        cu_seqlens: int32 or int64, where each packed sequence starts and ends.
        mask: the tokens to keep; without ``cu_seqlens`` and ``token_rewards`` its shape ``[S, T]`` gives the sequences.
        token_rewards: additional rewards per token, such as ``-kl_coef * kl_estimate(logps, ref_logps, "k1")``.
        gamma: discount, in [0, 1].
        baseline: ``"none"`` or ``"group"``.
        group_size, group_ids: the groups for ``baseline="group"``, as for :func:`group_advantages`; at least two sequences per
            group.
        whiten: False returns the returns unchanged.
        eps: added to the variance when whitening.

    Returns:
        Tensor: shaped like the tokens, (N,) or (S, T), in the rewards' dtype, at least float32; 0 at masked positions.

    Raises:
        TypeError, ValueError: naming the argument; for fewer than two tokens to whiten, and for a group of one.

    Example:
        >>> rewards, lengths = torch.tensor([1.0, 0.0]), torch.tensor([0, 2, 4])
        >>> reinforce_plus_plus_advantages(rewards, cu_seqlens=lengths, gamma=0.5, whiten=False)
        tensor([0.5000, 1.0000, 0.0000, 0.0000])
    """
    _check_rewards(rewards)
    gamma = check_rate("gamma", gamma)
    check_choice("baseline", baseline, BASELINES)
    check_bool("whiten", whiten)
    eps = check_number("eps", eps, 0, open_low=True)
    if token_rewards is not None:
        check_float("token_rewards", token_rewards)
        segments = Segments.of("token_rewards", token_rewards, cu_seqlens, mask)
    elif mask is not None:
        check_like("mask", mask, mask, "mask", boolean=True)
        segments = Segments.of("mask", mask, cu_seqlens, mask)
    elif cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        length = int(cu_seqlens.reshape(-1)[-1]) if cu_seqlens.numel() else 0
        segments = Segments.of("tokens", rewards.new_empty(max(0, length)), cu_seqlens, None)
    else:
        raise ValueError("cu_seqlens, mask or token_rewards must be given: they say where the sequences are")
    check_one_each("rewards", rewards, segments.count, segments.bounds.device)
    if bool(rewards.isnan().any()):
        segments = segments.only(~rewards.isnan())
    if baseline == "group":
        groups = _Groups(rewards, group_size, group_ids, pairs="baseline='group'")
        values, scored = _scored(rewards)
        means = groups.sums(values) / groups.sums(scored.to(values.dtype)).clamp(min=1)
        centered = torch.where(scored, values - means, 0)
    elif group_size is not None or group_ids is not None:
        given = "group_ids" if group_size is None else "group_size"
        raise ValueError(f"{given} is given, but baseline='none' has no groups")
    else:
        centered = rewards
    packed = _token_rewards(centered, segments, token_rewards)
    offsets = segments.offsets
    returns = gae(packed, torch.zeros_like(packed), cu_seqlens=offsets, gamma=gamma, lam=1.0).returns
    if whiten:
        if len(returns) < 2:
            what = "cu_seqlens must hold" if mask is None else "mask must leave"
            raise ValueError(f"{what} at least 2 tokens of scored sequences for whiten=True, got {len(returns)}")
        returns = masked_whiten(returns, eps=eps)
    return segments.unpack(returns.to(_dtype(rewards)))
