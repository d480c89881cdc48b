# mypy: allow-untyped-defs, allow-incomplete-defs
"""Device functions that every kernel shares: the head's transforms, and exponentials that never meet ``inf - inf``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_and_slope(u):
    """``tanh(u)`` and ``1 - tanh(u)^2``, both to a few ulp for any u, -inf and inf included.

    Near 0 an odd polynomial (relative error 4e-9 before rounding): 1 - exp(-2 u) would cancel there. The slope needs no
    such care, since ``1 - tanh(|u|) = 2 t / (1 + t)`` with ``t = exp(-2 |u|)`` is exact where tanh saturates.
    """
    size = tl.abs(u)
    t = tl.exp(-2.0 * size)
    inverse = 1.0 / (1.0 + t)
    large = (1.0 - t) * inverse
    s = u * u
    p = -0.005704939340965557 * s + 0.020639043205966212
    p = p * s - 0.053739701004333444
    p = p * s + 0.13331442015334488
    p = p * s - 0.33333281933534825
    small = size + size * (s * p)
    size_of_tanh = tl.where(size < 0.625, small, large)
    slope = (2.0 * t * inverse) * (1.0 + size_of_tanh)
    return tl.where(u < 0, -size_of_tanh, size_of_tanh), slope


@triton.jit
def rounded(r, MATCH: tl.constexpr):
    """Raw logits as ``precision="match"`` wants them: 0 not rounded, 1 to bfloat16, 2 to float16."""
    if MATCH == 1:
        r = r.to(tl.bfloat16).to(tl.float32)
    if MATCH == 2:
        r = r.to(tl.float16).to(tl.float32)
    return r


@triton.jit
def logits_of(u, cap, SOFTCAP: tl.constexpr):
    """Logits ``z`` of scaled raw logits, and ``1 - tanh^2`` (with a soft-cap; without one, a 1 that nobody needs).

    ``u = r * scale``: without a soft-cap ``scale = logit_scale / temperature`` and z is u; with one
    ``scale = logit_scale / softcap`` and ``cap = softcap / temperature``. z never falls as u grows.
    """
    if SOFTCAP:
        tanh, slope = tanh_and_slope(u)
        return tanh * cap, slope
    return u, 1.0


@triton.jit
def transform(r, scale, cap, SOFTCAP: tl.constexpr):
    """``logits_of`` raw logits ``r``."""
    return logits_of(r * scale, cap, SOFTCAP)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for float64 x > -1, exact near 0 too."""
    small = x * (1.0 - x * (0.5 - x * (0.3333333333333333 - x * 0.25)))
    return tl.where(tl.abs(x) < 1e-4, small, tl.log(1.0 + x))
