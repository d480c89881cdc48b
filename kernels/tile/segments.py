"""Sums over the tokens of each packed sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, offsets: Tensor, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return add(values, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
        values, offsets, _ = inputs
        ctx.save_for_backward(offsets)
        ctx.tokens = len(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return torch.repeat_interleave(grad, offsets.diff(), output_size=ctx.tokens), None, None


def segment_sum(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,) int64, rising from 0 to N
    add: Callable[[Tensor, Tensor], Tensor],  # a backend's ``segment_sum``
) -> Tensor:
    """Sums (S,) of ``values[offsets[j]:offsets[j + 1]]`` in the values' dtype, differentiable."""
    sums: Tensor = _SegmentSum.apply(values, offsets, add)
    return sums


def sequence_index(bounds: list[int], device: torch.device) -> Tensor:
    """The sequence of each packed token. bounds: S + 1 values -> (N,)."""
    lengths = torch.tensor([b - a for a, b in zip(bounds, bounds[1:], strict=False)], dtype=torch.long, device="cpu")
    return torch.repeat_interleave(lengths).to(device)
