"""``VocabParallel``: which rows of the head a rank holds, and what the ranks of a call agree on before they compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.head_spec import HeadSpec
from ..core.settings import current_settings
from .collectives import GatherRows, gather


@dataclass(frozen=True, eq=False)
class VocabParallel:
    """A head sharded over its vocabulary: each rank of a group holds consecutive rows of the weight (and bias).

    Every rank calls with its own ``weight`` (V_r, H) and the same labels, and gets the same statistics and the same loss, bit
    for bit. Each GEMM has V_r columns. Labels are entries of the whole head. Gradients: that of the weight and bias is of the
    rank's rows; that of the hidden states is complete on every rank.

    Args:
        group: process group of the ranks that hold the head; ``None``: all ranks.
        start: entry of the whole head that row 0 of this rank's weight is. Shards may differ in size.
        vocab_size: number of real entries of the whole head, V. Rows beyond it are padding: they get no probability and a
            gradient of 0. Every rank must hold at least one real entry.
        sequence_parallel: ``hidden`` (and ``ref_hidden``) holds this rank's consecutive positions of the flattened hidden
            states only, (P_r, H) in the order of ranks; other arguments are of all positions and the same on all ranks. The
            gradient is of this rank's positions, in the dtype of ``hidden``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> VocabParallel(None, start=0, vocab_size=151936).vocab_size
        151936
    """

    group: dist.ProcessGroup | None
    start: int
    vocab_size: int
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(self.group).__name__}")
        for name, value in (("start", self.start), ("vocab_size", self.vocab_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be >= 1, got {self.vocab_size}")
        if not 0 <= self.start < self.vocab_size:
            raise ValueError(f"start must be in [0, vocab_size={self.vocab_size}), got {self.start}")
        if not isinstance(self.sequence_parallel, bool):
            raise TypeError(f"sequence_parallel must be a bool, got {self.sequence_parallel!r}")

    @property
    def ranks(self) -> int:
        """The number of ranks of the group."""
        return dist.get_world_size(self.group)

    def entries(self, rows: int) -> int:
        """The number of real entries among the ``rows`` of this rank's weight."""
        return min(rows, self.vocab_size - self.start)

    def gather_positions(self, hidden: Tensor, name: str, labels: Tensor) -> Tensor:
        """With ``sequence_parallel``, the hidden states (*labels.shape, H) of all positions; else those given. Collective."""
        if not self.sequence_parallel or not isinstance(hidden, Tensor) or hidden.dim() < 1:
            return hidden
        rows = hidden.reshape(-1, hidden.shape[-1])
        counts = gather(torch.tensor([rows.shape[0], rows.shape[1]], device=hidden.device), self.group)
        sizes, widths = torch.stack(counts).t().tolist()
        if len(set(widths)) > 1 or sum(sizes) != labels.numel():
            raise ValueError(
                f"{name} must hold each of the {labels.numel()} positions of labels on one rank (sequence_parallel=True) with "
                f"one hidden size, got {sizes} positions and hidden sizes {widths}"
            )
        whole: Tensor = GatherRows.apply(rows, sizes, self.group)
        return whole.view(*labels.shape, hidden.shape[-1])


def enter(
    parallel: VocabParallel,
    hidden: Tensor,  # (..., H), or with sequence_parallel (P_r, H)
    weight: Any,  # (V_r, H), which ``read_weight`` has read
    labels: Tensor,  # (...)
    head: HeadSpec,
) -> tuple[Tensor, HeadSpec]:
    """The hidden states of all positions, and the transforms of this rank's rows: ``vocab_size`` is theirs."""
    if not isinstance(parallel, VocabParallel):
        raise TypeError(f"parallel must be a logitless.VocabParallel or None, got {type(parallel).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError("parallel is given in compiled code, where it is not served: call outside of torch.compile")
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight is a {type(weight).__name__}, which is not served with parallel: pass the rows of a plain weight, or the "
            "whole weight without parallel"
        )
    if head.vocab_size is not None:
        raise ValueError(
            f"head.vocab_size must be None with parallel, whose vocab_size is the number of real entries, got {head.vocab_size}"
        )
    if weight.dim() == 2 and parallel.entries(len(weight)) < len(weight):
        head = replace(head, vocab_size=parallel.entries(len(weight)))
    return parallel.gather_positions(hidden, "hidden", labels), head


@dataclass(frozen=True, eq=False)
class Shard:
    """What all ranks of a call have agreed on, and this rank's rows.

    Attributes:
        parallel: as given.
        largest: real entries of the largest shard; the plan of every rank is for that size.
        memory_budget: the smallest of all ranks, in bytes.
    """

    parallel: VocabParallel
    largest: int
    memory_budget: int

    @classmethod
    def agree(
        cls,
        parallel: VocabParallel,
        rows: int,  # of this rank's weight
        num_tokens: int,
        needs: tuple[bool, ...],  # which gradients are wanted
        device: torch.device,
    ) -> Shard:
        """One all-gather. Raises the same error on every rank where the ranks' arguments do not fit each other."""
        wanted = sum(bool(need) << i for i, need in enumerate(needs))
        budget = current_settings().memory_budget
        mine = torch.tensor([parallel.start, rows, num_tokens, wanted, budget, parallel.vocab_size], device=device)
        starts, sizes, tokens, gradients, budgets, totals = torch.stack(gather(mine, parallel.group)).t().tolist()
        same = {"vocab_size of parallel": totals, "number of scored tokens": tokens, "set of wanted gradients": gradients}
        for what, values in same.items():
            if len(set(values)) > 1:
                raise ValueError(f"the {what} must be the same on all ranks of parallel.group, got {values}")
        spans = sorted((start, start + size) for start, size in zip(starts, sizes, strict=True))
        stops = [0, *(stop for _, stop in spans)]
        if [start for start, _ in spans] != stops[:-1] or stops[-1] < parallel.vocab_size:
            raise ValueError(
                f"parallel must describe shards that cover entries 0 to {parallel.vocab_size} once, got rows "
                f"{', '.join(f'{a}:{b}' for a, b in spans)}"
            )
        largest = max(min(stop, parallel.vocab_size) - start for start, stop in spans)
        return cls(parallel, largest, min(budgets))
