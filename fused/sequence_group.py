"""Sequences that several ranks share (context parallelism): sums over whole sequences, of which each rank has some tokens.

Every rank runs the same collectives, whatever tokens it has and whatever schedule its plan chose: with a sequence group, the
tokens of a rank are one group of the plan, hence one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from logitless.kernels.core.process_group import check_group, gather_from_ranks, sum_over_ranks

from .call import LossCall
from .checks import check_data
from .scored_tokens import ScoredTokens

NAME = "sequence_group"
#: Above every position and every number of sequences.
_LARGEST = 1 << 31


def with_sequence_group(call: LossCall, group: Any) -> LossCall:
    """The call with the checked argument ``sequence_group``. A group of one rank is the same as none."""
    if group is None:
        return call
    check_group(NAME, group)
    return replace(call, sequence_group=group if dist.get_world_size(group) > 1 else None)


def first_of_group(group: Any) -> bool:
    """Whether this rank counts the sequences that a group shares: every rank without a group, else its first."""
    if group is None:
        return True
    check_group(NAME, group)
    return dist.get_rank(group) == 0


class _WholeSums(torch.autograd.Function):
    """Sums over the ranks, differentiable with respect to this rank's own."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ctx.group = group if partial else None
        return sum_over_ranks(sums, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad if ctx.group is None else sum_over_ranks(grad, ctx.group), None, None


def whole_sums(sums: Tensor, group: dist.ProcessGroup, *, partial_loss: bool) -> Tensor:
    """``sums`` added over the ranks of the group.

    Args:
        partial_loss: whether what follows is this rank's part of the loss, so that gradients must be added over the ranks too.
            Otherwise each rank computes the whole loss, and has the whole gradient already.
    """
    added: Tensor = _WholeSums.apply(sums, group, partial_loss)
    return added


def whole_rows(sums: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Sums by name, (s,) each, added over the ranks in one collective, where every rank computes the whole loss."""
    whole = whole_sums(torch.stack(list(sums.values())), group, partial_loss=False)
    return {name: row if sums[name].requires_grad else row.detach() for name, row in zip(sums, whole, strict=True)}


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """Ranks that share the sequences: 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


@dataclass(frozen=True)
class WholeSequences:
    """What a rank knows of sequences that it shares.

    Attributes:
        group: the ranks that share them.
        lengths: (S,) scored tokens of each sequence, on all ranks.
        offsets: (S + 1,) where each sequence starts and ends among this rank's tokens.
    """

    group: dist.ProcessGroup
    lengths: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, tokens: ScoredTokens, group: dist.ProcessGroup, dtype: torch.dtype) -> WholeSequences:
        """Exchange the number of scored tokens of each sequence. Sequences are in order: they are one group of the plan."""
        sizes = torch.tensor(tokens.sequence_sizes, dtype=dtype, device=tokens.device)
        _, offsets = tokens.sequences_of(0, len(tokens.groups))
        return cls(group, sum_over_ranks(sizes, group), offsets)

    def segment_sum(self, add: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """A backend's ``segment_sum``, whose result is added over the ranks."""
        return lambda values, offsets: self.sums(add(values, offsets))

    def sums(self, values: Tensor) -> Tensor:
        """``values``, a part of a sum on each rank, added; without a gradient."""
        return sum_over_ranks(values, self.group)


def check_position_ids(call: LossCall, position_ids: Any, *, needed: bool) -> None:
    """The argument ``position_ids``. ``needed``: whether the loss reads the order of a sequence's tokens over the ranks."""
    check_data("position_ids", position_ids)
    if position_ids is None:
        if needed:
            raise ValueError(
                "position_ids is needed by ld_alpha with a sequence_group: the position of each label or hidden state "
                "in its whole sequence"
            )
        return
    if not needed:
        raise ValueError("position_ids is given, but only ld_alpha with a sequence_group reads it")
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in (torch.int32, torch.int64):
        what = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise TypeError(f"position_ids must be an int32 or int64 tensor, got {what}")
    if position_ids.shape != call.labels.shape:
        raise ValueError(
            f"position_ids must have shape {tuple(call.labels.shape)} like labels, got {tuple(position_ids.shape)}"
        )
    if position_ids.device != call.labels.device:
        raise ValueError(f"position_ids is on {position_ids.device} but labels is on {call.labels.device}: move one of them")


def rank_tokens(tokens: ScoredTokens, position_ids: Tensor, group: dist.ProcessGroup) -> ScoredTokens:
    """The tokens with their ranks among the counted tokens of whole sequences, and the sizes of these.

    Two collectives: the largest number of tokens of a rank, then a sort key of each token. Copies both to the host.
    """
    counted = torch.ones_like(tokens.sequences, dtype=torch.bool) if tokens.counted is None else tokens.counted
    positions = position_ids.reshape(-1)[tokens.rows].long()
    places = torch.where((positions >= 0) & (positions < _LARGEST), tokens.sequences * _LARGEST + positions, -1)
    own = places[counted]
    most = torch.tensor(len(own), device=own.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    end = len(tokens.sequence_sizes) * _LARGEST
    padded = own.new_full((int(most),), end)
    padded[: len(own)] = own
    ordered = gather_from_ranks(padded, group).reshape(-1).sort().values
    equal = (ordered[1:] == ordered[:-1]) & (ordered[1:] < end)
    if bool(equal.any() | (ordered[:1] < 0).any()):  # the same on every rank
        raise ValueError(
            "position_ids must be at least 0, and distinct within a sequence over the ranks of sequence_group: positions in "
            "the whole sequence, not in this rank's part"
        )
    firsts = torch.arange(len(tokens.sequence_sizes) + 1, device=own.device) * _LARGEST
    starts = torch.searchsorted(ordered, firsts)
    ranks = torch.searchsorted(ordered, places) - starts[tokens.sequences]
    return replace(tokens, ranks=ranks, whole_sizes=starts.diff().tolist())
