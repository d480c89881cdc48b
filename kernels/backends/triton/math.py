# mypy: allow-untyped-defs, allow-incomplete-defs
"""Device functions shared by the kernels: the head's transforms, conversions between types, and bounded exponentials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.head_spec import HeadSpec
from ...tile.sums import FLOOR as _FLOOR
from ...tile.sums import RAISE_ABOVE as _RAISE_ABOVE

#: ``exp`` underflows below it; clamping to it keeps ``-inf * 0`` out of sums.
FLOOR = tl.constexpr(_FLOOR)
#: A logit this far (nats) above its row's offset raises the offset.
RAISE_ABOVE = tl.constexpr(_RAISE_ABOVE)
#: Triton's types.
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}


def scale_and_cap(head: HeadSpec) -> tuple[float, float]:
    """The numbers ``scale`` and ``cap`` that :func:`transform` takes for a head; ``cap`` is unused without a soft-cap.

    A row with a temperature of its own multiplies ``cap``, or ``scale`` without a soft-cap, by its inverse temperature.
    """
    if head.softcap is None:
        return head.logit_scale / head.temperature, 1.0
    return head.logit_scale / head.softcap, head.softcap / head.temperature


@triton.jit
def tanh_and_slope(u):
    """``tanh(u)`` and ``1 - tanh(u)^2``, both to a few ulp for any float32 u, infinities included.

    Near 0 an odd polynomial (relative error 4e-9 before rounding) replaces ``1 - exp(-2 u)``, which would cancel. The slope
    needs no such case: ``1 - tanh(|u|) = 2 t / (1 + t)`` with ``t = exp(-2 |u|)`` is exact where tanh saturates.
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
    """Raw logits rounded for ``precision="match"``: MATCH is 0 for no rounding, 1 for bfloat16, 2 for float16."""
    if MATCH == 1:
        r = r.to(tl.bfloat16).to(tl.float32)
    if MATCH == 2:
        r = r.to(tl.float16).to(tl.float32)
    return r


@triton.jit
def logits_of(u, cap, SOFTCAP: tl.constexpr):
    """Logits ``z`` of scaled raw logits, and the slope ``1 - tanh^2`` of the soft-cap (1 without one).

    ``u = r * scale``: without a soft-cap ``scale = logit_scale / temperature`` and z is u; with one
    ``scale = logit_scale / softcap`` and ``cap = softcap / temperature``. z is monotonic in u.
    """
    if SOFTCAP:
        tanh, slope = tanh_and_slope(u)
        return tanh * cap, slope
    else:
        return u, 1.0


@triton.jit
def transform(r, scale, cap, SOFTCAP: tl.constexpr):
    """:func:`logits_of` of raw logits ``r`` in float32."""
    return logits_of(r * scale, cap, SOFTCAP)


@triton.jit
def transformed(r, scale, cap, SOFTCAP: tl.constexpr):
    """:func:`transform` of float32 or float64 raw logits, to the precision of their type."""
    if SOFTCAP and r.dtype == tl.float64:
        u = r * scale
        size = tl.abs(u)
        t = tl.exp(-2.0 * size)
        s = u * u
        # the continued fraction of tanh, to 6e-18 below 0.625
        fraction = 1.0 + s / (3.0 + s / (5.0 + s / (7.0 + s / (9.0 + s / (11.0 + s / (13.0 + s / 15.0))))))
        tanh = tl.where(size < 0.625, size / fraction, (1.0 - t) / (1.0 + t))
        slope = 2.0 * t / (1.0 + t) * (1.0 + tanh)
        z = tl.where(u < 0, -tanh, tanh) * cap
    else:
        z, slope = transform(r, scale, cap, SOFTCAP)
    return z, slope


@triton.jit
def exact(number, ACC: tl.constexpr):
    """A number of the host in the type of the sums. Declared float64, since Triton rounds a Python float to float32."""
    return tl.full((), number, tl.float64).to(ACC)


@triton.jit
def converted(values, TYPE: tl.constexpr):
    """``values`` in another type; from float64 to 16 bits by way of float32, as torch converts."""
    if values.dtype == tl.float64 and tl.float64 != TYPE:
        values = values.to(tl.float32)
    return values.to(TYPE)


@triton.jit
def log1p(x):
    """``log(1 + x)`` of float64 x > -1, exact near 0 too."""
    small = x * (1.0 - x * (0.5 - x * (0.3333333333333333 - x * 0.25)))
    return tl.where(tl.abs(x) < 1e-4, small, tl.log(1.0 + x))
