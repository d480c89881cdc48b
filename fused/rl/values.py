"""The loss of a value function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless.kernels.sequence_logps import segment_sum

from ..checks import check_choice, check_number
from ..num_items import Counted, over, read_num_items
from .checks import check_float, check_like
from .masked import masked_mean
from .segments import Segments

AGGREGATIONS = ("token-mean", "sequence-mean")


class ValueLoss(NamedTuple):
    """The result of :func:`value_loss`.

    Attributes:
        loss: 0-dim, differentiable in the values.
        clip_fraction: 0-dim, the fraction of tokens whose clipped error is the larger one; 0 without clipping.
    """

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor,  # (N,), or (S, T)
    returns: Tensor,  # like values
    *,
    old_values: Tensor | None = None,  # like values
    clip_range: float | None = None,
    mask: Tensor | None = None,  # like values, bool
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    aggregation: str = "token-mean",
    num_items_in_batch: Tensor | Sequence[Tensor | float] | float | None = None,  # 0-dim, or (2,)
) -> ValueLoss:
    """Half the squared error of the values, clipped as in PPO (https://huggingface.co/papers/2005.12729, "value clipping"):
    ``0.5 * max((v - R)**2, (clamp(v, v_old - clip_range, v_old + clip_range) - R)**2)``, as verl's ``compute_value_loss``.

    Args:
        values: estimates of the value function, floating point; padded ``[S, T]``, or packed ``[N]``.
        returns: their targets, see :func:`logitless.gae`; treated as constants.
        old_values: estimates at the time of sampling; treated as constants. Required with ``clip_range``.
        clip_range: largest distance of a value from the old one, above 0. None: no clipping.
        mask: the tokens to keep. Values at other positions change neither the loss nor a gradient.
        cu_seqlens: int32 or int64, where each packed sequence starts and ends; required for ``"sequence-mean"`` of packed
            values.
        aggregation: ``"token-mean"``: the mean over all kept tokens; ``"sequence-mean"``: the mean over sequences of the mean
            over each sequence's tokens. A sequence without tokens contributes 0 and is counted.
        num_items_in_batch: what to divide by if this call is one of several micro-batches: the kept tokens
            (``"token-mean"``) or sequences of all of them. Their losses and gradients then add up to those of one batch. A pair
            ``(sequences, tokens)`` is accepted too. A count of 0 gives a loss of 0.

    Returns:
        ValueLoss: loss and clip fraction in the dtype of the values, at least float32; 0 without tokens.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> values = torch.tensor([1.0, 2.0])
        >>> value_loss(values, torch.tensor([0.0, 2.0]), old_values=torch.tensor([2.0, 2.0]), clip_range=0.5)
        ValueLoss(loss=tensor(0.5625), clip_fraction=tensor(0.5000))
    """
    check_float("values", values)
    check_like("returns", returns, values, "values")
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if (old_values is None) != (clip_range is None):
        given, other = ("clip_range", "old_values") if old_values is None else ("old_values", "clip_range")
        raise ValueError(f"{given} is given without {other}: clipping needs both")
    segments = None
    if cu_seqlens is not None or values.dim() == 2 or aggregation == "sequence-mean":
        segments = Segments.of("values", values, cu_seqlens, mask)
    elif values.dim() != 1:
        raise ValueError(f"values must have shape [N] or [S, T], got {tuple(values.shape)}")
    if mask is not None:
        check_like("mask", mask, values, "values", boolean=True)
    dtype = torch.promote_types(torch.promote_types(values.dtype, returns.dtype), torch.float32)
    v, target = _only(values, mask, dtype), _only(returns.detach(), mask, dtype)
    losses = (v - target).square()
    clip_fraction = torch.zeros((), dtype=dtype, device=values.device)
    if old_values is not None:
        check_like("old_values", old_values, values, "values")
        reach = check_number("clip_range", clip_range, 0, open_low=True)
        old = _only(old_values.detach(), mask, dtype)
        clipped = (torch.clamp(v, old - reach, old + reach) - target).square()
        clip_fraction = masked_mean((clipped > losses).to(dtype).detach(), mask)
        losses = torch.maximum(losses, clipped)
    of_tokens = aggregation == "token-mean"
    counted = Counted(None, "kept tokens") if of_tokens else Counted("sequences", None)
    # whether any token is kept would have to be copied from a GPU, so that a count of 0 is not compared with it
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    items = read_num_items(num_items_in_batch, counted).checked(False, False, values.device, wide)
    if of_tokens:
        mean = masked_mean(losses, mask)
        if items.tokens is not None:
            mean = over(losses.sum(dtype=wide), items.tokens).to(dtype)
        return ValueLoss(0.5 * mean, clip_fraction)
    assert segments is not None
    sums = segment_sum(losses.reshape(-1), segments.bounds)
    means = sums / segments.offsets.diff().clamp(min=1)
    loss = over(means.sum(), segments.count if items.units is None else items.units)
    return ValueLoss(0.5 * loss.to(dtype), clip_fraction)


def _only(tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values, with 0 at masked positions."""
    return tokens.to(dtype) if mask is None else torch.where(mask, tokens.to(dtype), 0)
