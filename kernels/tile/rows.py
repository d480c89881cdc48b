"""Which rows of hidden states take part, how they are gathered, and how their gradients find their places."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import native


def capturing(labels: Tensor) -> bool:
    """Whether a CUDA graph is being captured. Its replays may have other labels, so it cannot depend on which are ignored."""
    return labels.is_cuda and torch.cuda.is_current_stream_capturing()


class ScoredRows(NamedTuple):
    """The rows that are computed: those that are scored or, in a captured graph, all, with zeros where none is."""

    taken: Tensor  # (N,) their indices
    scored: Tensor | None  # (P,) bool, where all rows are computed

    @classmethod
    def of(cls, labels: Tensor, ignore_index: int) -> ScoredRows:
        scored = labels != ignore_index
        if capturing(labels):
            return cls(torch.arange(len(labels), device=labels.device), scored)
        return cls(scored.nonzero()[:, 0], None)

    def hidden(self, hidden: Tensor) -> Tensor:
        """(P, H) -> (N, H)"""
        return gather_rows(hidden, self.taken) if self.scored is None else torch.where(self.scored[:, None], hidden, 0)

    def labels(self, labels: Tensor, bias: Tensor | None) -> Tensor:
        """(P,) -> (N,). In place of an ignored label stands the one of the largest bias: label 0's may be -inf."""
        if self.scored is None:
            return labels[self.taken]
        return torch.where(self.scored, labels, 0 if bias is None else bias.argmax())

    def values(self, values: Tensor) -> Tensor:
        """What is given for each token. (P,) -> (N,)"""
        return values[self.taken] if self.scored is None else torch.where(self.scored, values, 0)


def gather_rows(hidden: Tensor, rows: Tensor, in_order: bool = True) -> Tensor:
    """``hidden[rows]``; no copy when that is all of them ``in_order``. hidden (P, H), rows (N,) -> (N, H)."""
    return hidden if in_order and len(rows) == len(hidden) else hidden.index_select(0, rows)


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

    rows (N,); unless they are ``distinct``, the values of one that comes up twice add up. values, base (N, H); factor 0-dim
    or (N,).
    """
    n, width = values.shape
    out = torch.zeros(shape, dtype=dtype, device=values.device)
    if distinct and base is None and native.serves(values.device) and values.is_contiguous():
        factor = values.new_ones(1) if factor is None else factor.to(values.dtype).reshape(-1)
        torch.ops.logitless.scale_scatter(values, rows, factor.contiguous(), out.view(-1, width))
        return out
    step = max(1, (1 << 19) // max(1, width))
    for r in range(0, n, step):
        part = values[r : r + step]
        if factor is not None:
            part = part * (factor if factor.dim() == 0 else factor[r : r + step, None])
        if base is not None:
            part = part + base[r : r + step]
        put = out.index_copy_ if distinct else out.index_add_
        put(0, rows[r : r + step], part.to(dtype))
    return out
