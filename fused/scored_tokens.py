"""The scored tokens of a batch, in the order in which the engine processes them: group by group, largest group first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.kernels.core.checks import check_label_range
from logitless.kernels.tile.segments import sequence_index

from .call import LossCall


@dataclass(frozen=True)
class ScoredTokens:
    """N scored tokens, sorted by group, then sequence, then position.

    Attributes:
        rows: (N,) position in the flattened hidden states. Distinct, unless an NLL label differs from the label there.
        labels: (N,) int64.
        sequences: (N,) sequence of each token.
        ranks: (N,) index of each token among the counted tokens of its sequence.
        counted: (N,) bool, part of the sequence's log-probability; ``None``: all are.
        nll: (N,) bool, part of the NLL term; ``None``: all are.
        weights: (N,) float, weight in the sequence's log-probability; ``None``: 1.
        groups: sequences of each group, in the order of the tokens.
        group_sizes: tokens of each group.
        sequence_sizes: tokens of each sequence, by sequence.
        whole_sizes: counted tokens of each sequence on all ranks that share it, where ``ranks`` are among those.
    """

    rows: Tensor
    labels: Tensor
    sequences: Tensor
    ranks: Tensor
    counted: Tensor | None
    nll: Tensor | None
    weights: Tensor | None
    groups: list[list[int]]
    group_sizes: list[int]
    sequence_sizes: list[int]
    whole_sizes: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def counted_sizes(self) -> list[int]:
        """Counted tokens of each sequence."""
        if self.whole_sizes is not None:
            return self.whole_sizes
        if self.counted is None:
            return self.sequence_sizes
        counts = torch.bincount(self.sequences[self.counted], minlength=len(self.sequence_sizes))
        return [int(c) for c in counts.tolist()]

    def sequences_of(self, first_group: int, last_group: int) -> tuple[list[int], Tensor]:
        """The sequences of groups ``first_group:last_group``, and where each starts and ends among their tokens, (s + 1,)."""
        sequences = [s for group in self.groups[first_group:last_group] for s in group]
        ends = itertools.accumulate(self.sequence_sizes[s] for s in sequences)
        return sequences, torch.tensor([0, *ends], device=self.device)


def sequence_of_position(labels: Tensor, bounds: list[int] | None) -> tuple[Tensor, int]:
    """The sequence of each flattened position and their number; labels (S, T), or packed (N,) with bounds."""
    if bounds is None:
        count, length = labels.shape
        return torch.arange(count * length, device=labels.device) // max(1, length), count
    return sequence_index(bounds, labels.device), len(bounds) - 1


def find_scored_tokens(
    call: LossCall,
    groups: Sequence[Sequence[int]],
    token_weights: Tensor | None = None,  # like labels
    nll_labels: Tensor | None = None,  # like labels
    nll_sequences: Sequence[int] = (),
) -> ScoredTokens:
    """Find the scored tokens and sort them. Copies their number to the host: the one synchronisation of a call."""
    labels, vocab_size, ignore_index = call.labels, call.vocab_size, call.ignore_index
    where, num_sequences = sequence_of_position(labels, call.bounds)
    flat = labels.reshape(-1).long()
    scored = flat != ignore_index
    check_label_range(flat, scored, vocab_size, ignore_index)
    rows = scored.nonzero()[:, 0]
    values = flat[rows]
    counted = nll = None
    if nll_labels is not None:
        other = nll_labels.reshape(-1).long()
        wanted = other != ignore_index
        check_label_range(other, wanted, vocab_size, ignore_index, "nll_labels")
        has_nll = torch.zeros(num_sequences, dtype=torch.bool, device="cpu")
        has_nll[list(nll_sequences)] = True
        wanted &= has_nll.to(where.device)[where]  # labels of sequences without an NLL term are not scored
        extra = (wanted & (other != flat)).nonzero()[:, 0]  # tokens that only the NLL term scores
        counted = torch.cat((torch.ones_like(rows), torch.zeros_like(extra))).bool()
        nll = torch.cat(((wanted & (other == flat))[rows], torch.ones_like(extra).bool()))
        rows, values = torch.cat((rows, extra)), torch.cat((values, other[extra]))
    sequences = where[rows]
    sizes = torch.bincount(sequences, minlength=num_sequences).tolist()
    order = sorted(range(len(groups)), key=lambda g: (-sum(sizes[s] for s in groups[g]), g))
    chosen = [list(groups[g]) for g in order]
    place = torch.full((num_sequences,), -1, dtype=torch.long, device="cpu")
    flat_order = [s for group in chosen for s in group]
    place[flat_order] = torch.arange(len(flat_order), device="cpu")
    position = place.to(rows.device)[sequences]
    if len(flat_order) < num_sequences:  # sequences that no objective uses are not scored
        used = (position >= 0).nonzero()[:, 0]
        rows, values, sequences, position = rows[used], values[used], sequences[used], position[used]
        counted = None if counted is None else counted[used]
        nll = None if nll is None else nll[used]
    sort = torch.argsort(position, stable=True)
    rows, values, sequences = rows[sort], values[sort], sequences[sort]
    counted = None if counted is None else counted[sort]
    nll = None if nll is None else nll[sort]
    used_sizes = [sizes[s] if place[s] >= 0 else 0 for s in range(num_sequences)]
    starts, total = [0] * num_sequences, 0
    for s in flat_order:
        starts[s] = total
        total += used_sizes[s]
    ranks = torch.arange(len(rows), device=rows.device) - torch.tensor(starts, device=rows.device)[sequences]
    weights = None
    if token_weights is not None:
        weights = token_weights.reshape(-1)[rows].double()
    return ScoredTokens(
        rows=rows,
        labels=values,
        sequences=sequences,
        ranks=ranks,
        counted=counted,
        nll=nll,
        weights=weights,
        groups=chosen,
        group_sizes=[sum(used_sizes[s] for s in group) for group in chosen],
        sequence_sizes=used_sizes,
    )


def merge_groups(groups_of_terms: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Join groups that share a sequence. Sequences keep the order in which they first appear."""
    parent: dict[int, int] = {}

    def find(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for groups in groups_of_terms:
        for group in groups:
            for s in group:
                parent.setdefault(s, s)
                parent[find(s)] = find(group[0])
    merged: dict[int, list[int]] = {}
    for s in parent:
        merged.setdefault(find(s), []).append(s)
    return list(merged.values())
