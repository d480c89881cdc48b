# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pass that adds the entropy's gradient to a finished tile of exponentials, see ``entropy_tile``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.head_spec import HeadSpec
from ..torch import passes as torch_scan
from .aot.compilation import Compilation, aligned
from .compat import on_device
from .rows import OPTIONS, converted, exact

#: exp underflows below it.
FLOOR = tl.constexpr(torch_scan.FLOOR)
#: Elements of a row for each program: 16 a thread.
BLOCK = 2048


@triton.jit(do_not_specialize=["mix", "k", "mix_stride"])
def mix_tile_kernel(
    tile,  # (N, V), updated
    mix,  # (2, N)
    k,  # (N,)
    inverse_cap: tl.float64,
    tile_stride,
    mix_stride,
    columns,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's pieces are the second dimension of the grid."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ACC: tl.constexpr = k.dtype.element_ty
    at = tile + row * tile_stride + column
    e = tl.load(at, mask=column < columns, other=0.0).to(ACC)
    d = tl.maximum(tl.log(e), FLOOR)
    constant = tl.load(mix + row)
    linear = tl.load(mix + row + mix_stride)
    if SOFTCAP:
        t = (d + tl.load(k + row)) * exact(inverse_cap, ACC)
        e -= e * tl.minimum(t * t, 1.0)
    g = tl.where(e == 0, 0.0, e * (constant + linear * d))
    tl.store(at, converted(g, tile.dtype.element_ty), mask=column < columns)


def mix_tile(
    tile: Tensor,  # (N, V)
    mix: Tensor,  # (2, N)
    k: Tensor,  # (N,)
    head: HeadSpec,
) -> None:
    """See ``entropy_tile.mix_tile_``. The labels' entries may be negative here: what comes of them is written over."""
    n, columns = tile.shape
    if tile.numel() == 0:
        return
    mix = mix.to(k.dtype).contiguous()
    with on_device(tile):
        mix_tile_kernel[n, triton.cdiv(columns, BLOCK)](
            tile,
            mix,
            k.contiguous(),
            0.0 if head.softcap is None else head.temperature / head.softcap,
            tile.stride(0),
            mix.stride(0),
            columns,
            SOFTCAP=head.softcap is not None,
            BLOCK=BLOCK,
            num_warps=4,
            **OPTIONS,
        )


def compilations() -> list[Compilation]:
    """A bf16 tile, a float32 one (of fp16 and float32 operands), and float64, each with a soft-cap and without."""
    found = []
    for dtype, acc in (("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        types = dict.fromkeys(("tile_stride", "mix_stride", "columns"), "i32") | {"inverse_cap": "fp64"}
        types |= {"tile": f"*{dtype}", "mix": f"*{acc}", "k": f"*{acc}"}
        for softcap in (False, True):
            name = f"mix_tile{'_softcap' * softcap}_{dtype}"
            constants = {"SOFTCAP": softcap, "BLOCK": BLOCK}
            found.append(aligned(mix_tile_kernel, name, types, constants, 4, dtype=dtype))
    return found
