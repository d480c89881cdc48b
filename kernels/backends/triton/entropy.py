# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pass that turns a finished tile of exponentials into the gradient of a loss with an entropy: see ``torch/entropy.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.head_spec import HeadSpec
from ...core.row_head import inverse_temperature
from ...core.stats import CoreOptions
from .launch import Launch
from .math import FLOOR, converted, exact

#: Elements of a row per program: 16 per thread.
BLOCK = 2048


@triton.jit(do_not_specialize=["mix", "k", "inverse", "mix_stride"])
def mix_tile_kernel(
    tile,  # (N, V), updated
    mix,  # (2, N)
    k,  # (N,)
    inverse,  # (N,) inverse temperatures of the rows, or None
    inverse_cap: tl.float64,
    tile_stride,
    mix_stride,
    columns,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second dimension of the grid divides a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ACC: tl.constexpr = k.dtype.element_ty
    at = tile + row * tile_stride + column
    e = tl.load(at, mask=column < columns, other=0.0).to(ACC)
    d = tl.maximum(tl.log(e), FLOOR)
    constant = tl.load(mix + row)
    linear = tl.load(mix + row + mix_stride)
    if SOFTCAP:
        to_tanh = exact(inverse_cap, ACC)
        if inverse is not None:
            to_tanh /= tl.load(inverse + row)
        t = (d + tl.load(k + row)) * to_tanh
        e -= e * tl.minimum(t * t, 1.0)
    g = tl.where(e == 0, 0.0, e * (constant + linear * d))
    tl.store(at, converted(g, tile.dtype.element_ty), mask=column < columns)


def mix_tile_launch(
    tile: Tensor,  # (N, V)
    mix: Tensor,  # (2, N)
    k: Tensor,  # (N,)
    head: HeadSpec,
) -> Launch:
    """The launch of ``mix_tile_kernel`` for N x ``ceil(V / BLOCK)`` programs."""
    mix = mix.to(k.dtype).contiguous()
    return Launch(
        mix_tile_kernel,
        {
            "tile": tile,
            "mix": mix,
            "k": k.contiguous(),
            "inverse": inverse_temperature(head),
            "inverse_cap": 0.0 if head.softcap is None else head.temperature / head.softcap,
            "tile_stride": tile.stride(0),
            "mix_stride": mix.stride(0),
            "columns": tile.shape[1],
        },
        {"SOFTCAP": head.softcap is not None, "BLOCK": BLOCK},
        num_warps=4,
    )


def mix_tile_(
    tile: Tensor,  # (N, V), updated
    mix: Tensor,  # (2, N)
    k: Tensor,  # (N,)
    head: HeadSpec,
    options: CoreOptions,
    *,
    transposed: bool = False,
) -> None:
    """See ``ElementWise.mix_tile_``. The labels' entries may be negative, and become NaN: the caller overwrites them.

    Raises:
        ValueError: for a ``transposed`` tile (V, N), which only the backend ``cpu`` makes.
    """
    if transposed:
        raise ValueError("transposed must be False: the Triton kernel takes tiles (N, V)")
    if tile.numel():
        mix_tile_launch(tile, mix, k, head).run(len(tile), triton.cdiv(tile.shape[1], BLOCK))
