"""Per-sequence log-probabilities, and the shift between hidden states and labels."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .core.checks import check_ignore_index, check_tensor, check_token_weights, checked_offsets
from .core.head_spec import HeadSpec
from .core.head_weight import Weight
from .core.process_group import check_group, gather_from_ranks
from .core.settings import current_settings
from .linear_logps import linear_logps
from .parallel.vocab_parallel import VocabParallel
from .tile import segments


def shift(
    hidden: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    layout: str = "contiguous",
    *,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Align hidden states with the labels that they predict: ``hidden[:, :-1]``, ``labels[:, 1:]``.

    With ``group``, each rank has a part of every sequence. The last label of a part comes from the rank that has the next part,
    so all positions are kept: hidden states are returned as they are, and the label of a sequence's last position is
    ``ignore_index``. Every rank of the group must call this with the same shapes; one all-gather of one label per part.

    Args:
        hidden: (..., T, H); with ``group`` the hidden states of this rank's positions.
        labels: (..., T), not shifted yet; of the same positions.
        group: the ranks that share the sequences (context parallelism).
        layout: which positions of a sequence rank r of W has: ``"contiguous"``, the r-th of W equal parts; ``"zigzag"``, of 2 W
            equal parts number r, then number ``2 W - 1 - r``, which balances causal attention. T must then be even.
        ignore_index: the label of a sequence's last position, with ``group``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> x, y = shift(torch.zeros(2, 5, 16), torch.zeros(2, 5, dtype=torch.long))
        >>> x.shape, y.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 4]))
    """
    check_tensor("hidden", hidden)
    check_tensor("labels", labels)
    if labels.dim() < 1 or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have shape {tuple(hidden.shape[:-1])} like hidden without its last dimension, got "
            f"{tuple(labels.shape)}"
        )
    if layout not in _PARTS:
        raise ValueError(f"layout must be one of {tuple(_PARTS)}, got {layout!r}")
    if group is None:
        if layout != "contiguous":
            raise ValueError(f"layout={layout!r} is used with a group only")
        return hidden[..., :-1, :], labels[..., 1:]
    check_group("group", group)
    check_ignore_index(ignore_index)
    return hidden, _shift_over_ranks(labels, group, _PARTS[layout], ignore_index)


#: Parts of a sequence that each rank has, by layout.
_PARTS = {"contiguous": 1, "zigzag": 2}


def _shift_over_ranks(labels: Tensor, group: dist.ProcessGroup, parts: int, ignore_index: int) -> Tensor:
    """Each label moved to the position before it, over the borders of parts. labels (..., T)."""
    length = labels.shape[-1]
    if length < parts or length % parts:
        raise ValueError(
            f"labels must have a positive number of positions on each rank, divisible by {parts} for this layout, got "
            f"{length}: pad the sequences"
        )
    size = length // parts
    first = gather_from_ranks(labels[..., ::size].movedim(-1, 0), group)  # (W, parts, ...): the first label of each part
    rank, ranks = dist.get_rank(group), len(first)
    shifted = labels.roll(-1, -1)
    if rank + 1 < ranks:
        after = first[rank + 1, 0]
    else:  # the next part, if there is one, is this rank's own second part
        after = first[rank, 1] if parts == 2 else torch.full_like(labels[..., 0], ignore_index)
    shifted[..., size - 1] = after
    if parts == 2:
        shifted[..., -1] = first[rank - 1, 1] if rank else ignore_index
    return shifted


def sequence_logps(
    hidden: Tensor,  # (S, T, H), or packed (N, H) with cu_seqlens
    weight: Weight,  # (V, H)
    labels: Tensor,  # (S, T), or packed (N,)
    bias: Tensor | None = None,
    head: HeadSpec | None = None,
    *,
    reduction: str = "sum",
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    token_weights: Tensor | None = None,  # like labels
    ignore_index: int = -100,
    temperature: Tensor | None = None,  # like labels
    parallel: VocabParallel | None = None,
) -> Tensor:
    """Log-probability of each sequence: the (weighted) sum over its scored tokens, or that divided by their number.

    Args:
        hidden, weight, labels, bias, head, ignore_index, temperature, parallel: as in :func:`linear_logps`; padded
            ``[S, T]``, or packed with ``cu_seqlens``.
        reduction: ``"sum"`` or ``"mean"``. The mean of a sequence without scored tokens is 0.
        cu_seqlens: for packed input, where each sequence starts and ends.
        token_weights: weight of each token in the sum; the divisor of the mean counts tokens, whatever their weight.

    Returns:
        Tensor: (S,) float32 (float64 for float64 input), differentiable.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> x, w = torch.randn(7, 16), torch.randn(100, 16)
        >>> sequence_logps(x, w, torch.randint(100, (7,)), cu_seqlens=torch.tensor([0, 3, 7])).shape
        torch.Size([2])
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    check_tensor("labels", labels)
    if token_weights is not None:
        check_token_weights(token_weights, labels)
    if cu_seqlens is None and labels.dim() != 2:
        raise ValueError(f"labels must have shape [S, T], or be packed with cu_seqlens, got {tuple(labels.shape)}")
    if cu_seqlens is not None and labels.dim() != 1:
        raise ValueError(f"labels must have shape [N] with cu_seqlens, got {tuple(labels.shape)}")
    logps = linear_logps(hidden, weight, labels, bias, head, ("logps",), ignore_index, temperature, parallel).logps
    assert logps is not None
    scored = labels != ignore_index
    counts = scored.to(logps.dtype)
    if token_weights is not None:
        logps = logps * torch.where(scored, token_weights, 0).to(logps.dtype)
    if cu_seqlens is None:
        sums, lengths = logps.sum(dim=-1), counts.sum(dim=-1)
    else:
        offsets = checked_offsets(cu_seqlens, len(labels), labels.device)
        sums, lengths = segment_sum(logps, offsets), segment_sum(counts, offsets)
    return sums if reduction == "sum" else sums / lengths.clamp(min=1)


def segment_sum(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,) int64, rising from 0 to N
) -> Tensor:
    """Sums (S,) of ``values[offsets[j]:offsets[j + 1]]`` in the values' dtype, differentiable; for functions without a plan."""
    backend = current_settings().backend
    return segments.segment_sum(values, offsets, lambda v, o: torch.ops.logitless.segment_sum(v, o, backend))
