"""Generalized advantage estimation over packed or padded segments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.kernels.backends.triton.compat import why_no_triton
from logitless.kernels.core.settings import current_settings

from .checks import check_float, check_like, check_one_each, check_rate
from .segments import Segments

#: Tokens per block of the scan. For 1M tokens, one token of each block is 125 KB of float64, which stays in cache.
BLOCK = 64


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
    if rewards.device.type != "cpu" and current_settings().backend != "torch" and not why_no_triton():
        from logitless.kernels.backends.triton import gae as kernels

        flat = None if last_values is None else last_values.contiguous()
        pair = kernels.gae(rewards.reshape(-1), values.reshape(-1), segments.bounds, segments.mask, gamma, decay, flat, dtype)
        return GAE(*(t.view(rewards.shape) for t in pair))
    r, v = segments.pack(rewards), segments.pack(values)
    if len(v) == 0:
        return GAE(*(torch.zeros(rewards.shape, dtype=dtype, device=rewards.device) for _ in range(2)))
    wide = torch.float32 if v.device.type == "mps" else torch.float64  # which has no float64
    filled, last = segments.last
    if last_values is not None:
        r = r.to(wide, copy=True)
        r[last] += gamma * last_values[filled].to(wide)
    ends = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    ends[last] = True
    return GAE(*(segments.unpack(t) for t in _scan(r, v, ends, gamma, decay, wide, dtype)))


def _scan(
    rewards: Tensor,  # (N,), at least one
    values: Tensor,  # (N,)
    ends: Tensor,  # (N,) bool, the last tokens of segments
    gamma: float,
    decay: float,
    wide: torch.dtype,  # to compute in
    dtype: torch.dtype,  # of the results
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (N,).

    Blocks of consecutive tokens are scanned side by side, one token of each at a time. Their first tokens are a sequence of
    the same kind, which is scanned likewise. What follows a block then enters up to the first end in it. A select, not a
    product with 0, keeps segments apart: a NaN in one must not reach another. A product and a sum are rounded one by one,
    since a fused operation would depend on where a number stands in memory.
    """
    n = len(values)
    block = min(BLOCK, 1 << math.isqrt(n - 1).bit_length())  # a power of 2 above the square root
    count = -(-n // block)

    def side_by_side(tokens: Tensor, fill: float) -> Tensor:  # (block, count)
        padded = F.pad(tokens, (0, count * block - n), value=fill) if count * block != n else tokens
        return padded.view(count, block).t().contiguous()

    r, v, closed = side_by_side(rewards, 0), side_by_side(values, 0), side_by_side(ends, True)
    y = torch.empty((block, count), dtype=wide, device=v.device)
    term, following = torch.empty_like(y[0]), torch.zeros_like(y[0])
    following[:-1] = v[0, 1:]
    for i in reversed(range(block)):
        torch.mul(following, gamma, out=y[i])
        if i + 1 < block:
            y[i] += torch.mul(y[i + 1], decay, out=term)
        following.copy_(v[i])
        y[i].masked_fill_(closed[i], 0).add_(r[i]).sub_(following)
    if count > 1:
        for i in reversed(range(block - 1)):
            closed[i] |= closed[i + 1]
        first = _scan(y[0], torch.zeros_like(y[0]), closed[0], 0.0, decay**block, wide, wide)[0]
        following.zero_()[:-1] = first[1:]
    # the copies of the inputs may hold the results: fresh memory costs more than the arithmetic
    advantages, returns = (t if count > 1 and t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in (r, v))
    for i in range(block):
        if count > 1:
            torch.mul(following, decay ** (block - i), out=term)
            y[i] += term.masked_fill_(closed[i], 0)
        advantages[i] = y[i]
        returns[i] = y[i].add_(v[i])
    return advantages.t().reshape(-1)[:n], returns.t().reshape(-1)[:n]
