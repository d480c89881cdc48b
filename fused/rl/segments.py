"""The layout of a batch of segments: padded or packed tokens, some of them masked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logitless.kernels.core.checks import checked_offsets

from .checks import check_like


@dataclass(frozen=True)
class Segments:
    """Where the segments of a batch are, and which tokens are kept.

    Functions on packed tokens skip masked tokens: the kept tokens before and after them are consecutive.
    """

    shape: torch.Size
    bounds: Tensor  # (S + 1,) int64, of all tokens
    mask: Tensor | None  # (N,) bool, the tokens to keep

    @classmethod
    def of(cls, name: str, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Segments:
        """Check ``cu_seqlens`` and ``mask`` against ``tokens``, (N,) with ``cu_seqlens`` or else (S, T)."""
        if mask is not None:
            check_like("mask", mask, tokens, name, boolean=True)
        if cu_seqlens is None:
            if tokens.dim() != 2:
                raise ValueError(f"{name} must have shape [S, T], or [N] with cu_seqlens, got {tuple(tokens.shape)}")
            count, length = tokens.shape
            bounds = torch.arange(count + 1, device=tokens.device) * length
        else:
            if tokens.dim() != 1:
                raise ValueError(f"{name} must have shape [N] with cu_seqlens, got {tuple(tokens.shape)}")
            bounds = checked_offsets(cu_seqlens, len(tokens), tokens.device)
        return cls(tokens.shape, bounds, None if mask is None else mask.reshape(-1))

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def kept(self) -> Tensor | None:
        """Indices of the kept tokens, (N',); None if all are kept."""
        return None if self.mask is None else self.mask.nonzero()[:, 0]

    @cached_property
    def offsets(self) -> Tensor:
        """The bounds among the kept tokens, (S + 1,)."""
        if self.mask is None:
            return self.bounds
        before = torch.zeros(len(self.mask) + 1, dtype=torch.long, device=self.mask.device)
        torch.cumsum(self.mask, 0, out=before[1:])
        return before[self.bounds]

    @cached_property
    def last(self) -> tuple[Tensor, Tensor]:
        """Which segments have kept tokens, (S,) bool, and the index of the last one of each such segment among kept tokens."""
        filled = self.offsets[1:] > self.offsets[:-1]
        return filled, self.offsets[1:][filled] - 1

    def only(self, wanted: Tensor) -> Segments:
        """The same segments, with the tokens of those that are not ``wanted``, (S,) bool, masked."""
        mask = torch.repeat_interleave(wanted, self.bounds.diff(), output_size=math.prod(self.shape))
        return Segments(self.shape, self.bounds, mask if self.mask is None else mask & self.mask)

    def pack(self, tokens: Tensor) -> Tensor:
        """The kept tokens, (N',)."""
        flat = tokens.reshape(-1)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of :meth:`pack`; 0 at masked positions."""
        if self.kept is None:
            return packed.view(self.shape)
        out = packed.new_zeros(math.prod(self.shape))
        return out.index_copy_(0, self.kept, packed).view(self.shape)
