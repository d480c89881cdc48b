"""The factors between a block of exponentials and the operands of the gradient GEMMs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.blocking import ROW_ELEMENTS, blocks
from ..core.head_spec import HeadSpec
from ..core.stats import RowStats
from .sums import FLOOR
from .targets import targets_in_tile

#: Elements of a tile that a GPU widens at a time.
_GPU_ELEMENTS = 1 << 24
#: Scale of a fp16 gradient tile, so that probabilities down to 2e-9 keep their precision.
FP16_SCALE = 2.0**15


def gradient_factors(
    stats: RowStats,
    coefficients: Tensor | None,  # (N,) dLoss / dlogps
    entropy_coefficients: Tensor | None,  # (N,) dLoss / dentropy, with stats.entropy
    head: HeadSpec,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A row of dLoss / d raw logits is ``scale * exp(z_v - k) * slope_v * (mix[0] + mix[1] * (z_v - k))`` and, at the target,
    ``scale * at_target``. Returns scale (N,), at_target (N,) and mix (2, N), ``None`` for 1 and 0.
    """
    inverse = (-stats.log_denom).exp()
    c = torch.zeros_like(stats.k) if coefficients is None else coefficients
    if entropy_coefficients is None:
        scale, at_target, mix = -c * head.slope * inverse, -stats.sum_others, None
    else:
        assert stats.entropy is not None
        scale = -head.slope * inverse
        log_p = (stats.target_offset - stats.log_denom).clamp(min=FLOOR)
        at_target = entropy_coefficients * (log_p + stats.entropy) * stats.target_offset.exp() - c * stats.sum_others
        mix = torch.stack((c + entropy_coefficients * (stats.entropy - stats.log_denom), entropy_coefficients))
    return scale, at_target if stats.target_slope is None else at_target * stats.target_slope, mix


def for_gemm(
    scale: Tensor,  # (N,)
    at_target: Tensor,  # (N,)
    mix: Tensor | None,  # (2, N)
    stats: RowStats,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``gradient_factors`` such that a block of the gradient is in fp16's range, or its labels' entries are exact in bf16."""
    if grad_dtype == torch.float16:
        normal = (-stats.log_denom).exp() * FP16_SCALE
        if mix is None:
            mix = torch.stack((normal, torch.zeros_like(normal)))
        else:  # the coefficients are in the tile too: an entry is at most a few times their size
            assert stats.entropy is not None
            size = mix[0].abs() + mix[1].abs() * (1 + stats.entropy + stats.log_denom.abs())
            normal = normal / (4 * size).clamp(min=1e-30)
            mix = mix * normal
        return scale / normal, at_target * normal, mix
    return scale * rounding_of(at_target, grad_dtype) if targets_in_tile(scale.device) else scale, at_target, mix


def block_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def rounding_of(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact / exact.to(dtype)``: it makes the target entry of a row exact, which is as large as all others together. (N,).

    The error moves to the other entries, whose own roundings average out.
    """
    ratio = exact / exact.to(dtype).to(exact.dtype)
    return torch.where(ratio.isfinite(), ratio, 1)


def scale_rows(x: Tensor, a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``x * a[:, None]`` in ``dtype`` and the factor (0-dim) still missing: fp16 cannot hold small a. x (N, H), a (N,)."""
    factor = None
    if dtype == torch.float16:
        factor = a.abs().amax().clamp(min=1e-30) if len(a) else None
        a = a if factor is None else a / factor
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = len(x) if x.is_cuda else max(1, ROW_ELEMENTS // max(1, x.shape[1]))
    for r0, r1 in blocks(len(x), max(1, step)):  # no full-size temporary in a's dtype
        out[r0:r1].copy_(x[r0:r1] * a[r0:r1, None])
    return out, factor


def add_bias_gradient(
    bias: Tensor,  # (V,), added to
    tile: Tensor,  # (N, V)
    scale: Tensor,  # (N,)
) -> None:
    """``bias += tile.T @ scale`` in the bias' dtype."""
    step = max(1, (_GPU_ELEMENTS if tile.is_cuda else ROW_ELEMENTS) // tile.shape[1])
    for r0, r1 in blocks(len(tile), step):
        bias.addmv_(tile[r0:r1].to(bias.dtype).t(), scale[r0:r1].to(bias.dtype))
