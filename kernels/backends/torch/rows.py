"""Rows of gradients: scaled, rounded and put in their places."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.blocking import ROW_ELEMENTS

_ROWS = 2048  # weight rows converted at a time, so that conversion needs no second full-size buffer


def scatter_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Tensor,
    values: Tensor,
    factor: Tensor | None = None,
    base: Tensor | None = None,
    distinct: bool = True,
) -> Tensor:
    """A tensor of that shape (P, H) with ``values * factor + base`` at ``rows`` and 0 elsewhere, made a few rows at a time.

    rows (N,); unless they are ``distinct``, values of equal rows add up. values, base (N, H); factor 0-dim
    or (N,).
    """
    n, width = values.shape
    out = torch.zeros(shape, dtype=dtype, device=values.device)
    step = max(1, ROW_ELEMENTS // max(1, width))
    for r in range(0, n, step):
        part = values[r : r + step]
        if factor is not None:
            part = part * (factor if factor.dim() == 0 else factor[r : r + step, None])
        if base is not None:
            part = part + base[r : r + step]
        put = out.index_copy_ if distinct else out.index_add_
        put(0, rows[r : r + step], part.to(dtype))
    return out


def scaled_to_dtype(source: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """``(source * factor).to(dtype)`` without a full-size temporary; ``in_place`` may overwrite ``source``."""
    if source.dtype == dtype:
        return source.mul_(factor) if in_place else source * factor
    out = torch.empty(source.shape, dtype=dtype, device=source.device)
    for r in range(0, source.shape[0], _ROWS):
        out[r : r + _ROWS].copy_(source[r : r + _ROWS] * factor)
    return out
