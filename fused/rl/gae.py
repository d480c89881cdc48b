"""Generalized advantage estimation over packed or padded segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logitless.kernels.backends.registry import choose_elementwise

from .checks import check_float, check_like, check_one_each, check_rate
from .segments import Segments


class GAE(NamedTuple):
    """The result of :func:`gae`. Both tensors are shaped like the rewards, carry no gradient, and are 0 at masked positions.

    Attributes:
        advantages: generalized advantage estimates.
        returns: ``advantages + values``, the targets of the value function (lambda-returns).
    """

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,  # (N,) with cu_seqlens, or (S, T)
    values: Tensor,  # like rewards
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    mask: Tensor | None = None,  # like rewards, bool
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # (S,)
) -> GAE:
    """Generalized advantage estimation, https://huggingface.co/papers/1506.02438 eq. 16, segment by segment:

        delta_t = rewards_t + gamma * values_{t+1} - values_t
        advantages_t = delta_t + gamma * lam * advantages_{t+1}

    Masked tokens are skipped: the tokens before and after them are consecutive, and the values at masked positions are ignored.
    After the last token of a segment, the value is that of ``last_values`` and the advantage is 0.

    Args:
        rewards: reward of each token, floating point; padded ``[S, T]``, or packed ``[N]`` with ``cu_seqlens``.
        values: estimate of the value function before each token, floating point.
        cu_seqlens: int32 or int64, where each packed segment starts and ends. Segments may be empty.
        mask: the tokens to keep; masked tokens may be anywhere in a segment.
        gamma: discount, in [0, 1].
        lam: weight of longer horizons, in [0, 1]: 0 for one-step temporal differences, 1 for Monte Carlo returns.
        last_values: value after the last token of a truncated segment. Default: 0, for a segment that ended.

    Returns:
        GAE: advantages and returns in the dtype of the rewards, at least float32; computed in float64.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> rewards, values = torch.tensor([0.0, 0.0, 1.0, 5.0]), torch.tensor([0.5, 0.5, 0.5, 1.0])
        >>> gae(rewards, values, cu_seqlens=torch.tensor([0, 3, 4]), lam=1.0).advantages
        tensor([0.5000, 0.5000, 0.5000, 4.0000])
    """
    check_float("rewards", rewards)
    check_like("values", values, rewards, "rewards")
    gamma, decay = check_rate("gamma", gamma), check_rate("gamma", gamma) * check_rate("lam", lam)
    segments = Segments.of("rewards", rewards, cu_seqlens, mask)
    if last_values is not None:
        check_one_each("last_values", last_values, segments.count, rewards.device)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    flat = None if last_values is None else last_values.contiguous()
    scan = choose_elementwise(rewards.device, "gae").gae
    pair = scan(rewards.reshape(-1), values.reshape(-1), segments.bounds, segments.mask, gamma, decay, flat, dtype)
    return GAE(*(t.view(rewards.shape) for t in pair))
