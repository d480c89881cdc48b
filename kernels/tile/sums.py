"""Sums over the vocabulary relative to the target logit, block by block, and the statistics that they add up to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..core.stats import RowStats

#: A logit this far (nats) above the offset k raises k to the row maximum. exp(30)^2 * V stays finite in float32.
RAISE_ABOVE = 30.0
#: exp underflows to 0 below this in float32 and float64; keeps -inf * 0 out of the entropy sum.
FLOOR = -1000.0


@dataclass
class BlockSums:
    """Sums over one block of the vocabulary without the target, relative to ``k`` (``None``: the target logit). Each (N,)."""

    e: Tensor
    ez: Tensor | None = None
    ee: Tensor | None = None
    z: Tensor | None = None
    #: For the argmax, as the GEMM made them: the target (-inf where it is not in this block), and the largest logit before
    #: and after it in the vocabulary.
    target: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    k: Tensor | None = None
    #: (N, H) sum of the exponentials' slopes times the weight's rows, which ``unit_dhidden`` of a shard asks for.
    dhidden: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[BlockSums]) -> BlockSums:
        """Join the sums of consecutive tokens."""
        joined: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(p, f.name) for p in parts]
            joined[f.name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)


def merge(parts: list[BlockSums], k: Tensor) -> tuple[BlockSums, list[Tensor | None]]:
    """The sums over all blocks, relative to their common offset, and for each block the factor (N,) from its offset to that
    one (``None``: 1).

    Blocks may be of one rank's part of the vocabulary, or the parts of all ranks.
    """
    factors: list[Tensor | None] = [None] * len(parts)
    if any(p.k is not None for p in parts):
        offsets = torch.stack([k if p.k is None else p.k for p in parts])
        k = offsets.amax(dim=0)
        for i, p in enumerate(parts):
            shift = offsets[i] - k
            factors[i] = f = shift.exp()
            if p.ez is not None:
                p.ez = (p.ez + torch.where(f > 0, shift, 0) * p.e) * f
            if p.ee is not None:
                p.ee = p.ee * f * f
            p.e = p.e * f

    def total(name: str) -> Tensor | None:
        # one after the other: the order in which torch.sum adds rows differs between columns of one tensor
        columns = [getattr(p, name) for p in parts]
        return None if columns[0] is None else functools.reduce(torch.add, columns)

    e = total("e")
    assert e is not None
    sums = BlockSums(e, total("ez"), total("ee"), total("z"), k=k)
    if parts[0].target is not None:
        names = "target", "before", "after"
        sums.target, sums.before, sums.after = (torch.stack([getattr(p, n) for p in parts]).amax(dim=0) for n in names)
    return sums, factors


def statistics(sums: BlockSums, zy: Tensor, ty: Tensor | None, vocab: int) -> RowStats:
    """What the sums over the whole vocabulary add up to, for target logits ``zy`` with slope ``ty``, (N,) each."""
    r, k = sums.e, sums.k
    assert k is not None
    offset = zy - k
    target = offset.exp()
    denominator = r + target
    at_target = offset == 0
    log_denom = torch.where(at_target, r.log1p(), denominator.log())
    stats = RowStats(
        logps=torch.where(at_target, -log_denom, offset - log_denom),
        k=k,
        sum_others=r,
        log_denom=log_denom,
        target_offset=offset,
        target_slope=ty,
    )
    if sums.ez is not None:
        stats.entropy = log_denom - (sums.ez + target * offset.clamp(min=FLOOR)) / denominator
    if sums.ee is not None:
        # 1 - sum p^2 = R / D (1 + p_y) - sum of p_v^2 over v != y: small where the model is sure, and then log1p keeps it
        p_y, squares = target / denominator, sums.ee / denominator / denominator
        rest = (r / denominator * (1 + p_y) - squares).clamp(min=0)
        stats.log_sum_sq_probs = torch.where(rest < 0.5, (-rest).log1p(), (squares + p_y * p_y).log())
    if sums.z is not None:
        stats.mean_logits = sums.z / vocab
    if sums.target is not None and sums.before is not None and sums.after is not None:
        stats.is_top1 = (sums.target > sums.before) & (sums.target >= sums.after)
    return stats


def combine(
    parts: list[BlockSums], zy: Tensor, k: Tensor, ty: Tensor | None, vocab: int
) -> tuple[RowStats, list[Tensor | None]]:
    """The statistics of all blocks together, and the factors of :func:`merge`."""
    sums, factors = merge(parts, k)
    return statistics(sums, zy, ty, vocab), factors
