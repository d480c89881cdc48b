"""Tokens in segments that tests of this folder share, and generalized advantage estimation as a loop over them."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import HealthCheck, settings

F32, F64 = torch.float32, torch.float64
NAN, INF = math.nan, math.inf
#: Relative error of one rounding.
ROUND = {F32: 2**-24, F64: 2**-53}


def quick(examples: int = 40):
    """Settings of a property."""
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


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


def some_mask(seed=0, sequences=5, width=11):
    """Right-padded sequences of 1 to ``width`` tokens."""
    lengths = torch.randint(1, width + 1, (sequences,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(width) < lengths[:, None]
