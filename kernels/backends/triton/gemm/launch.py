"""Hands tensors to the GEMM kernels: blocks of logits, of gradients, and filtered products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ....core.head_spec import HeadSpec
from ....core.stats import CoreOptions
from ...native.passes import rounding
from ..compat import descriptor_step, gemm_warps, on_device
from ..rows import OPTIONS, finish_tile_kernel, head_numbers
from ..tuning.configs import GemmConfig, multiprocessors
from .combine import combine_kernel
from .filtered import filtered_kernel
from .kernels import gradient_kernel, score_kernel

#: Rows of a program of ``combine_kernel``, and blocks that it adds at a time.
COMBINE_ROWS, COMBINE_CHUNK = 32, 32
#: Rows of ``stats`` in ``combine_kernel``.
STATS = ("logps", "sum_others", "log_denom", "target_offset", "entropy", "mean_logits", "log_sum_sq_probs")


@dataclass(frozen=True)
class PartialRows:
    """Which row of the partial sums holds what; 0 for what is not wanted. Rows 0 and 1 are the sums of e and the offsets."""

    ez: int
    z: int
    ee: int
    target: int  # and the next two
    top: int
    count: int

    @classmethod
    def of(cls, outputs: frozenset[str], filtered: bool) -> PartialRows:
        """Those of the token statistics wanted; ``filtered``: a gradient tile follows of which blocks may be left out."""
        count, rows = 2, {}
        names = {"ez": "entropy", "z": "mean_logits", "ee": "log_sum_sq_probs", "target": "is_top1"}
        wanted = {row: name in outputs for row, name in names.items()} | {"top": filtered}
        for row, is_wanted in wanted.items():
            rows[row] = count if is_wanted else 0
            count += (3 if row == "target" else 1) * is_wanted
        return cls(**rows, count=count)

    def constants(self) -> dict[str, Any]:
        return {
            "ROW_EZ": self.ez,
            "ROW_Z": self.z,
            "ROW_EE": self.ee,
            "ROW_TARGET": self.target,
            "ROW_TOP": self.top,
        }


def input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Of a GEMM: float32 operands keep their precision, in three products of TF32, unless torch may round them to it."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix: aligned rows that do not overlap."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) % descriptor_step(t.element_size()) == 0
    return aligned and t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.numel() > 0


def _aligned(t: Tensor) -> bool:
    """Whether Triton knows that every row of a matrix, and of its blocks, starts and ends at a multiple of 16 bytes.

    It asks integers for multiples of 16, whatever the elements' size.
    """
    return t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0


def _operands(x: Tensor, weight: Tensor, config: GemmConfig) -> tuple[Any, Any, bool]:
    """Both operands as the kernel takes them: descriptors, or tensors. x (N, H), weight (W, H), unit column strides."""
    if not (config.tma and _describable(x) and _describable(weight)):
        return x, weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [config.BLOCK_N, config.BLOCK_H]),
        TensorDescriptor.from_tensor(weight, [config.BLOCK_V, config.BLOCK_H]),
        True,
    )


def epilogue(kernel: Any, config: GemmConfig, *, softcap: bool, known: bool, filtered: bool) -> dict[str, Any]:
    """How the epilogue goes through a block.

    PART: columns that it handles at a time. A gradient, which adds nothing up, takes fewer where registers are short.

    APART: from how many columns on it handles halves strictly one after the other; BLOCK_V: never. That is where registers are
    short: with the soft-cap's tanh beside 128 of the block's elements in each thread, with operands that are not ``known`` to
    be aligned, and with the bookkeeping of a ``filtered`` gradient (which Triton 3.6 cannot compile in one piece for sm_100).

    FLATTEN: whether the next block's loads start during the epilogue. Not around halves of a gradient: Triton 3.6 fails on a
    branch that has no results in a flattened loop, 3.9 keeps too much in registers and waits for each product.
    """
    elements = config.BLOCK_N * config.BLOCK_V // (32 * config.num_warps)
    part = config.SOFTCAP_PART if softcap else config.PART
    columns = 32 if not known or (softcap and elements >= 128) else config.BLOCK_V
    if kernel is not gradient_kernel:
        return {"PART": part, "APART": columns, "FLATTEN": config.flatten}
    part = part if known or filtered else min(part, 16)
    columns = min(columns, 64) if filtered else columns
    return {"PART": part, "APART": columns, "FLATTEN": config.flatten and columns == config.BLOCK_V}


def _gemm(
    kernel: Any,
    config: GemmConfig,
    head: HeadSpec,
    options: CoreOptions,
    x: Tensor,  # (N, H)
    weight: Tensor,  # (W, H)
    bias: Tensor | None,  # (W,)
    *rest: Any,
    first: int,
    more: tuple[float, ...] = (),
    filtered: bool = False,
    **constants: Any,
) -> None:
    """Launch a kernel of gemm.py. ``rest``: its arguments between the bias and the sizes."""
    n, hidden = x.shape
    blocks = triton.cdiv(n, config.BLOCK_N) * triton.cdiv(len(weight), config.BLOCK_V)
    a, b, tma = _operands(x, weight, config)
    known = tma or (_aligned(x) and _aligned(weight))
    if not known:
        config = config.for_unaligned()
    programs = min(blocks, multiprocessors(x.device) * config.programs_per_sm)
    with on_device(x):
        kernel[programs,](
            a,
            b,
            x.stride(0),
            weight.stride(0),
            bias,
            *rest,
            n,
            len(weight),
            hidden,
            first,
            *head_numbers(head),
            *more,
            SOFTCAP=head.softcap is not None,
            MATCH=rounding(x.dtype, options.precision),
            BLOCK_N=config.BLOCK_N,
            BLOCK_V=config.BLOCK_V,
            BLOCK_H=config.BLOCK_H,
            GROUP=config.GROUP,
            TMA=tma,
            EVEN=hidden % config.BLOCK_H == 0,
            **epilogue(kernel, config, softcap=head.softcap is not None, known=known, filtered=filtered),
            PRECISION=input_precision(x.dtype, x.device),
            num_warps=gemm_warps(config.BLOCK_N, config.BLOCK_V, config.num_warps),
            num_stages=config.num_stages,
            **constants,
            **OPTIONS,
        )


def score_block(
    x: Tensor,  # (N, H), unit column stride
    weight: Tensor,  # (W, H), of x's dtype, unit column stride: vocabulary entries first..first+W
    bias: Tensor | None,  # (W,)
    labels: Tensor,  # (N,) int64
    zy: Tensor,  # (N,) float32 logits of the labels
    k: Tensor,  # (N,) float32 offsets, raised where this block needs it
    sums: Tensor | None,  # (7, N) float64 of earlier blocks, updated; None for the only block
    stats: Tensor | None,  # (7, N) float32, see STATS: written after the last block
    is_top1: Tensor | None,  # (N,) bool, as stats
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    *,
    first: int,
    vocab_size: int,
    start: Tensor | None = None,  # (N,) k of before the first block; None: this is it
    gradient: Tensor | None = None,  # (N, W), gets e * (1 - tanh^2), 0 at the label, each block by its own offset
) -> tuple[Tensor, Tensor | None]:
    """Adds a block of logits to the statistics.

    Returns what ``gradient``'s blocks of BLOCK_V columns are to be multiplied by, (blocks, N), and with ``grad_filter`` the
    largest exponential of each, (blocks, N).
    """
    assert len(weight) % config.BLOCK_V == 0 or first + len(weight) == vocab_size  # a label beyond a block is not in it
    n = len(x)
    rows = PartialRows.of(options.outputs, gradient is not None and options.grad_filter > 0)
    v_blocks = triton.cdiv(len(weight), config.BLOCK_V)
    partial = torch.empty((rows.count, v_blocks, n), dtype=torch.float32, device=x.device)
    gradient_stride = 0 if gradient is None else gradient.stride(0)
    _gemm(
        score_kernel, config, head, options, x, weight, bias, labels, k if start is None else start, partial, gradient,
        gradient_stride, first=first, **rows.constants(), SLOPE=not options.slopes_later,
    )  # fmt: skip
    with on_device(x):
        combine_kernel[triton.cdiv(n, COMBINE_ROWS),](
            partial,
            k,
            zy,
            sums,
            stats,
            is_top1,
            n,
            v_blocks,
            vocab_size,
            **rows.constants(),
            FIRST=first == 0,
            FACTORS=gradient is not None,
            BLOCK_R=COMBINE_ROWS,
            CHUNK=COMBINE_CHUNK,
            num_warps=4,
            **OPTIONS,
        )
    return partial[1], partial[rows.top] if rows.top else None


def finish_block(
    tile: Tensor,  # (N, W)
    factors: Tensor | None,  # (blocks, N), each for ``width`` columns
    labels: Tensor,  # (N,) columns of the tile, or outside
    at_target: Tensor | None,  # (N,)
    width: int,
) -> None:
    """Bring a block of the gradient to its rows' common offset, and write the labels' entries."""
    n, columns = tile.shape
    if tile.numel() == 0:
        return
    blocks = triton.cdiv(columns, width)
    with on_device(tile):
        finish_tile_kernel[n,](
            tile,
            factors,
            labels,
            at_target,
            tile.stride(0),
            0 if factors is None else factors.stride(0),
            columns,
            width,
            blocks,
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK=min(2048, triton.next_power_of_2(min(columns, width))),
            num_warps=8,
            **OPTIONS,
        )


def gradient_block(
    x: Tensor,  # (N, H), unit column stride
    weight: Tensor,  # (W, H), of x's dtype, unit column stride: vocabulary entries first..first+W
    bias: Tensor | None,  # (W,)
    labels: Tensor,  # (N,) int64
    k: Tensor,  # (N,) final
    mix: Tensor | None,  # (2, N) contiguous
    at_target: Tensor | None,  # (N,)
    scale: Tensor,  # (N,)
    gradient: Tensor,  # (N, W), written
    head: HeadSpec,
    options: CoreOptions,
    config: GemmConfig,
    *,
    first: int,
) -> Tensor | None:
    """The gradient of a block of logits whose statistics are known.

    Returns with ``grad_filter`` which blocks (BLOCK_N, BLOCK_V) of it count, (n_blocks, v_blocks) int8.
    """
    active = None
    if options.grad_filter > 0:
        shape = triton.cdiv(len(x), config.BLOCK_N), triton.cdiv(len(weight), config.BLOCK_V)
        active = torch.empty(shape, dtype=torch.int8, device=x.device)
    row_scale = None if active is None else scale
    _gemm(
        gradient_kernel, config, head, options, x, weight, bias, labels, k, mix, at_target, row_scale, gradient,
        gradient.stride(0), active, first=first, more=(float(options.grad_filter),), filtered=active is not None,
    )  # fmt: skip
    return active


def filtered_mm(
    g: Tensor,  # (N, W)
    b: Tensor,  # (W, H), or transposed (N, H), of g's dtype, unit column stride
    out: Tensor,  # (N, H), or transposed (W, H)
    active: Tensor,  # (n_blocks, v_blocks), 0 for what is left out
    config: GemmConfig,
    *,
    transposed: bool,
    accumulate: bool,
) -> None:
    """``out = g @ b``, transposed ``g.T @ b``, or added to ``out``, without the blocks of ``g`` that are not active."""
    keep = (active != 0).t() if transposed else active != 0
    places = torch.argsort(keep.logical_not().to(torch.int8), dim=1, stable=True).to(torch.int32).contiguous()
    counts = keep.sum(dim=1, dtype=torch.int32)
    block_out, block_in = (config.BLOCK_V, config.BLOCK_N) if transposed else (config.BLOCK_N, config.BLOCK_V)
    wide = g.element_size() == 4
    block_h = 64 if wide else 128
    with on_device(g):
        filtered_kernel[triton.cdiv(b.shape[1], block_h), len(places)](
            g,
            b,
            out,
            places,
            counts,
            g.stride(0),
            b.stride(0),
            out.stride(0),
            len(b),
            len(out),
            b.shape[1],
            places.shape[1],
            TRANSPOSED=transposed,
            ACCUMULATE=accumulate,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            BLOCK_H=block_h,
            STEP=min(block_in, 32 if wide else 64),
            PRECISION=input_precision(g.dtype, g.device),
            num_warps=8,
            num_stages=3,
            **OPTIONS,
        )
