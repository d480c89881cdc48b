"""The gradient of the head's weight and bias, while it is being made."""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm import mm_accumulate

_ROWS = 2048  # weight rows converted at a time, so that conversion needs no second full-size buffer


class HeadGradient:
    """Collects ``dW`` (V, H) and ``db`` (V,).

    With ``accumulate`` the sums are kept in float32 (float64 for float64 weights) until :meth:`finish` scales and rounds
    them once; error then does not depend on the number of tiles, and a loss scale cannot underflow. Without it each block
    of rows is written exactly once, in the weight's dtype, and no float32 buffer of the weight's size exists.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, need_weight: bool, need_bias: bool, accumulate: bool) -> None:
        self.acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.accumulate = accumulate
        self.weight_dtype = weight.dtype
        self.bias_dtype = bias.dtype if bias is not None else None
        self.weight: Tensor | None = None
        if need_weight:
            new = torch.zeros if accumulate else torch.empty
            self.weight = new(weight.shape, dtype=self.acc if accumulate else weight.dtype, device=weight.device)
        self.bias = torch.zeros(weight.shape[0], dtype=self.acc, device=weight.device) if need_bias else None

    def add_weight(self, v0: int, v1: int, g: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
        """Rows v0..v1 of dW get ``factor * g.T @ x``. g (N, v1 - v0), x (N, H), of one dtype; factor 0-dim."""
        assert self.weight is not None
        rows = self.weight[v0:v1]
        if self.accumulate:
            mm_accumulate(rows, g.t(), x, factor)
        elif g.dtype == rows.dtype and factor is None:
            torch.mm(g.t(), x, out=rows)
        else:
            block = torch.zeros(rows.shape, dtype=self.acc, device=rows.device)
            mm_accumulate(block, g.t(), x, factor)
            rows.copy_(block)

    def scale_(self, factor: Tensor) -> None:
        """Multiply what has been collected by a 0-dim tensor."""
        if self.weight is not None:
            self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)

    def add_scaled_(self, other: HeadGradient, factor: Tensor) -> None:
        """Add ``factor`` times another collection of the same kind."""
        for name in ("weight", "bias"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.addcmul_(its, factor)

    def zero_(self) -> None:
        for t in (self.weight, self.bias):
            if t is not None:
                t.zero_()


def scaled_to_dtype(source: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """``(source * factor).to(dtype)`` without a full-size temporary; ``in_place`` may overwrite ``source``."""
    if source.dtype == dtype:
        return source.mul_(factor) if in_place else source * factor
    out = torch.empty(source.shape, dtype=dtype, device=source.device)
    for r in range(0, source.shape[0], _ROWS):
        out[r : r + _ROWS].copy_(source[r : r + _ROWS] * factor)
    return out
