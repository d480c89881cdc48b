# mypy: allow-untyped-defs, allow-incomplete-defs
"""Generalized advantage estimation: one program a segment, which walks its blocks from the end.

What the token after ``t`` hands to it is ``w_t = gamma * value + gamma * lam * advantage`` of that token, and each token
that counts maps what it was handed to what it hands on:

    w -> gamma * value + gamma * lam * (reward - value + w)

A masked token hands on what it was handed. A block composes these maps, which are ``w -> a * w + b``, with a scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot.compilation import Compilation, aligned
from .compat import on_device
from .rows import OPTIONS, exact

#: Tokens of a segment that a program handles at a time.
BLOCK = 1024


@triton.jit
def after(a, b, a_next, b_next):
    """The map ``w -> a * w + b`` and then ``w -> a_next * w + b_next``, as one."""
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
    """Each block reads one token further than it writes: a token needs what it is handed, not what it hands on."""
    segment = tl.program_id(0)
    start, stop = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    discount, c = exact(gamma, tl.float64), exact(decay, tl.float64)
    TYPE: tl.constexpr = advantages.dtype.element_ty
    index = tl.arange(0, BLOCK)
    handed = tl.full((), 0.0, tl.float64)  # to the last token of the block
    if last_values is not None:
        handed = discount * tl.load(last_values + segment).to(tl.float64)
    end = stop
    while end > start:
        token = end - BLOCK + index
        here = token >= start
        follows = here & (token + 1 < end)  # the token at ``end`` is in ``handed``
        counts = follows
        if mask is not None:
            counts = counts & (tl.load(mask + token + 1, mask=follows, other=0) != 0)
        reward = tl.load(rewards + token + 1, mask=counts, other=0.0).to(tl.float64)
        value = tl.load(values + token + 1, mask=counts, other=0.0).to(tl.float64)
        a = tl.where(counts, c, 1.0)
        b = tl.where(counts, discount * value + c * (reward - value), 0.0)
        a, b = tl.associative_scan((a, b), 0, after, reverse=True)
        w = a * handed + b
        counts = here
        if mask is not None:
            counts = counts & (tl.load(mask + token, mask=here, other=0) != 0)
        reward = tl.load(rewards + token, mask=counts, other=0.0).to(tl.float64)
        value = tl.load(values + token, mask=counts, other=0.0).to(tl.float64)
        tl.store(advantages + token, tl.where(counts, reward - value + w, 0.0).to(TYPE), mask=here)
        tl.store(returns + token, tl.where(counts, reward + w, 0.0).to(TYPE), mask=here)
        w = tl.where(counts, discount * value + c * (reward - value + w), w)
        handed = tl.sum(tl.where(index == 0, w, 0.0))
        end -= BLOCK


def gae(
    rewards: Tensor,  # (N,)
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,) int64, rising from 0 to N
    mask: Tensor | None,  # (N,) bool
    gamma: float,
    decay: float,
    last_values: Tensor | None,  # (S,)
    dtype: torch.dtype,  # of the results
) -> tuple[Tensor, Tensor]:
    """See ``fused/rl/gae.py``; ``decay`` is ``gamma * lam``. Advantages and returns, each (N,)."""
    advantages = torch.empty(len(rewards), dtype=dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    wide = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    if len(rewards):
        with on_device(rewards):
            gae_kernel[len(offsets) - 1,](
                rewards.to(wide).contiguous(),
                values.to(wide).contiguous(),
                offsets.contiguous(),
                None if mask is None else mask.contiguous(),
                None if last_values is None else last_values.to(wide).contiguous(),
                advantages,
                returns,
                gamma,
                decay,
                BLOCK=BLOCK,
                num_warps=4,
                **OPTIONS,
            )
    return advantages, returns


def compilations() -> list[Compilation]:
    """With everything that is optional, and with nothing of it."""
    found = []
    for dtype in ("fp32", "fp64"):
        floats = dict.fromkeys(("rewards", "values", "last_values", "advantages", "returns"), f"*{dtype}")
        types = {**floats, "offsets": "*i64", "mask": "*i1", "gamma": "fp64", "decay": "fp64"}
        for name, absent in (("plain", {"mask": None, "last_values": None}), ("masked", {})):
            found.append(aligned(gae_kernel, f"gae_{name}_{dtype}", types, {**absent, "BLOCK": BLOCK}, 4, dtype=dtype))
    return found
