"""Generalized advantage estimation in plain torch operators: blocks of tokens are scanned side by side."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens of a block of the scan. For 1M tokens, one of each block are 125 KB of float64, which stay in a cache.
BLOCK = 64


def gae(
    rewards: Tensor,  # (N,)
    values: Tensor,  # (N,)
    bounds: Tensor,  # (S + 1,)
    mask: Tensor | None,  # (N,) bool
    gamma: float,
    decay: float,
    last_values: Tensor | None,  # (S,)
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :class:`~logitless.kernels.backends.interface.ElementWise`."""
    r, v, offsets, kept = rewards, values, bounds, None
    if mask is not None:
        kept = mask.nonzero()[:, 0]
        r, v = (t.index_select(0, kept) for t in (rewards, values))
        before = torch.zeros(len(mask) + 1, dtype=torch.long, device=mask.device)
        torch.cumsum(mask, 0, out=before[1:])
        offsets = before[bounds]
    if len(v) == 0:
        return torch.zeros(len(rewards), dtype=dtype, device=v.device), torch.zeros(len(rewards), dtype=dtype, device=v.device)
    wide = torch.float32 if v.device.type == "mps" else torch.float64  # which has no float64
    filled = offsets[1:] > offsets[:-1]
    last = offsets[1:][filled] - 1
    if last_values is not None:
        r = r.to(wide, copy=True)
        r[last] += gamma * last_values[filled].to(wide)
    ends = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    ends[last] = True
    advantages, returns = _scan(r, v, ends, gamma, decay, wide, dtype)
    if kept is None:
        return advantages, returns
    spread = torch.zeros((2, len(rewards)), dtype=dtype, device=v.device)
    spread[0].index_copy_(0, kept, advantages)
    spread[1].index_copy_(0, kept, returns)
    return spread[0], spread[1]


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
