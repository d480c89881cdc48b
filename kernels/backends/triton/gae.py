# mypy: allow-untyped-defs, allow-incomplete-defs
"""Generalized advantage estimation: one program per segment, which processes its blocks from the end.

The carry into token t is ``w_t = gamma * value + gamma * lam * advantage`` of token t + 1. An unmasked token maps the carry
that it gets to the carry of the token before it:

    w -> gamma * value + gamma * lam * (reward - value + w)

A masked token passes the carry on unchanged. These maps have the form ``w -> a * w + b``; a scan composes those of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .math import exact

#: Tokens of a segment that a program handles at a time.
BLOCK = 1024


@triton.jit
def after(a, b, a_next, b_next):
    """The composition of ``w -> a * w + b`` and then ``w -> a_next * w + b_next``."""
    return a * a_next, a_next * b + b_next


@triton.jit(do_not_specialize=["rewards", "values", "mask", "last_values", "advantages", "returns"])
def gae_kernel(
    rewards,  # (N,)
    values,  # (N,)
    offsets,  # (S + 1,)
    mask,  # (N,) or None
    last_values,  # (S,) or None
    advantages,  # (N,)
    returns,  # (N,)
    gamma: tl.float64,
    decay: tl.float64,  # gamma * lam
    BLOCK: tl.constexpr,
):
    """Each block reads one token beyond those that it writes: a token needs the carry of the token after it."""
    segment = tl.program_id(0)
    start, stop = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    discount, c = exact(gamma, tl.float64), exact(decay, tl.float64)
    TYPE: tl.constexpr = advantages.dtype.element_ty
    index = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, tl.float64)  # into the last token of the block
    if last_values is not None:
        carry = discount * tl.load(last_values + segment).to(tl.float64)
    end = stop
    while end > start:
        token = end - BLOCK + index
        here = token >= start
        follows = here & (token + 1 < end)  # the token at ``end`` is in ``carry``
        counts = follows
        if mask is not None:
            counts = counts & (tl.load(mask + token + 1, mask=follows, other=0) != 0)
        reward = tl.load(rewards + token + 1, mask=counts, other=0.0).to(tl.float64)
        value = tl.load(values + token + 1, mask=counts, other=0.0).to(tl.float64)
        a = tl.where(counts, c, 1.0)
        b = tl.where(counts, discount * value + c * (reward - value), 0.0)
        a, b = tl.associative_scan((a, b), 0, after, reverse=True)
        w = a * carry + b
        counts = here
        if mask is not None:
            counts = counts & (tl.load(mask + token, mask=here, other=0) != 0)
        reward = tl.load(rewards + token, mask=counts, other=0.0).to(tl.float64)
        value = tl.load(values + token, mask=counts, other=0.0).to(tl.float64)
        tl.store(advantages + token, tl.where(counts, reward - value + w, 0.0).to(TYPE), mask=here)
        tl.store(returns + token, tl.where(counts, reward + w, 0.0).to(TYPE), mask=here)
        w = tl.where(counts, discount * value + c * (reward - value + w), w)
        carry = tl.sum(tl.where(index == 0, w, 0.0))
        end -= BLOCK


def gae_launch(
    rewards: Tensor,  # (N,)
    values: Tensor,  # (N,)
    bounds: Tensor,  # (S + 1,)
    mask: Tensor | None,  # (N,)
    gamma: float,
    decay: float,
    last_values: Tensor | None,  # (S,)
    advantages: Tensor,  # (N,)
    returns: Tensor,  # (N,)
) -> Launch:
    """The launch of ``gae_kernel`` for S programs."""
    wide = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    return Launch(
        gae_kernel,
        {
            "rewards": rewards.to(wide).contiguous(),
            "values": values.to(wide).contiguous(),
            "offsets": bounds.contiguous(),
            "mask": None if mask is None else mask.contiguous(),
            "last_values": None if last_values is None else last_values.to(wide).contiguous(),
            "advantages": advantages,
            "returns": returns,
            "gamma": gamma,
            "decay": decay,
        },
        {"BLOCK": BLOCK},
        num_warps=4,
    )


def gae(
    rewards: Tensor,  # (N,)
    values: Tensor,  # (N,)
    bounds: Tensor,  # (S + 1,) int64, non-decreasing from 0 to N
    mask: Tensor | None,  # (N,) bool
    gamma: float,
    decay: float,  # gamma * lam
    last_values: Tensor | None,  # (S,)
    dtype: torch.dtype,  # of the results
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (N,); see ``fused/rl/gae.py``."""
    advantages = torch.empty(len(rewards), dtype=dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    if len(rewards):
        gae_launch(rewards, values, bounds, mask, gamma, decay, last_values, advantages, returns).run(len(bounds) - 1)
    return advantages, returns
