"""Which rows of the hidden states are computed, and how they are gathered."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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

    def temperatures(self, temperature: Tensor) -> Tensor:
        """Temperatures of tokens, 1 for those that are not scored. (P,) -> (N,)"""
        return temperature[self.taken] if self.scored is None else torch.where(self.scored, temperature, 1)


def gather_rows(hidden: Tensor, rows: Tensor, in_order: bool = True) -> Tensor:
    """``hidden[rows]``; no copy when that is all of them ``in_order``. hidden (P, H), rows (N,) -> (N, H)."""
    return hidden if in_order and len(rows) == len(hidden) else hidden.index_select(0, rows)
