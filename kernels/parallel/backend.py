"""A backend whose functions take one rank's rows of a sharded head, and return what the whole head gives.

Every rank scores its rows relative to an offset of its own: the target logit, or a larger one where that would overflow. One
all-gather of the partial sums follows, merged by the function that merges blocks of the vocabulary. A tile stays relative to
its rank's offset ``k_r``: the factor ``exp(k_r - k)`` is part of its rows' scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.head_spec import HeadSpec
from ..core.stats import CoreOptions, RowStats
from ..tile.head_gradient import HeadGradient
from ..tile.sums import BlockSums, combine
from ..tile.targets import put_targets, target_entry, target_logit_and_slope, targets_in_tile
from ..tile.unit import finish_unit
from .collectives import gather, start_sum, sum_
from .vocab_parallel import VocabParallel

_NAMES = ("k", "e", "ez", "ee", "z", "target", "before", "after")
#: An offset is at most this far above a rank's own, in nats: entries there are then below exp(-30) (exp(-570)) of the row, and
#: sums relative to the rank's offset stay finite.
_LARGEST_SHIFT = {torch.float32: 60.0, torch.float64: 600.0}


def sharded_backend(backend: Backend, parallel: VocabParallel) -> Backend:
    """``backend`` for a head of which this rank holds some rows. Its functions are collective; labels are of the whole head."""
    functions = _Functions(backend, parallel)
    return replace(
        backend,
        score=functions.score,
        tile_gradients=functions.tile_gradients,
        recompute_gradients=functions.recompute_gradients,
    )


class _Functions:
    def __init__(self, backend: Backend, parallel: VocabParallel) -> None:
        self.backend, self.parallel, self.group = backend, parallel, parallel.group

    def score(
        self,
        x: Tensor,  # (N, H)
        weight: Tensor,  # (V_r, H)
        bias: Tensor | None,  # (V_r,)
        labels: Tensor,  # (N,) of the whole head
        head: HeadSpec,
        options: CoreOptions,
        *,
        tile: Tensor | None = None,  # (N, V_r) gets this rank's columns, relative to the returned shard_k
        unit_dhidden: bool = False,
    ) -> RowStats:
        assert self.backend.score_shard is not None
        local = labels - self.parallel.start
        own = local.clamp(0, len(weight) - 1)
        raw = self.backend.elementwise.target_logits(x, weight, bias, own, options.precision)
        raw = sum_(torch.where(own == local, raw, 0), self.group)
        zy, k, ty = target_logit_and_slope(raw, head)
        given = x, weight, bias, local, zy, k, head, options
        sums = self.backend.score_shard(*given, tile=tile, unit_dhidden=unit_dhidden)
        names = [name for name in _NAMES if getattr(sums, name) is not None]
        parts = gather(torch.stack([getattr(sums, name) for name in names]), self.group)
        shards = [BlockSums(**dict(zip(names, part.unbind(), strict=True))) for part in parts]
        stats, _ = combine(shards, zy, k, ty, self.parallel.vocab_size)
        stats.shard_k = sums.k
        if sums.dhidden is not None:
            finish_unit(x, weight, local, self._of_shard(stats, local, own), head, sums.dhidden)
            stats.unit_dhidden = self._add_up(sums.dhidden)
        if tile is not None and targets_in_tile(tile.device):
            put_targets(tile, local, -target_entry(self._of_shard(stats, local, own)))
        return stats

    def tile_gradients(
        self,
        x: Tensor,  # (N, H)
        weight: Tensor,  # (V_r, H)
        labels: Tensor,  # (N,)
        tile: Tensor,  # (N, V_r)
        stats: RowStats,
        coefficients: Tensor,  # (N,)
        head: HeadSpec,
        options: CoreOptions,
        *,
        dhidden: Tensor | None,  # (N, H) written
        head_gradient: HeadGradient | None,
        entropy_coefficients: Tensor | None = None,  # (N,)
    ) -> None:
        local = labels - self.parallel.start
        of_shard = self._of_shard(stats, local, local.clamp(0, len(weight) - 1))
        pending: list[Any] = []

        def start() -> None:
            """Send dX while the GEMM of dW runs."""
            assert dhidden is not None
            if not self.parallel.sequence_parallel:
                pending.append(start_sum(dhidden, self.group))

        self.backend.tile_gradients(
            x,
            weight,
            local,
            tile,
            of_shard,
            coefficients,
            head,
            options,
            dhidden=dhidden,
            head_gradient=head_gradient,
            entropy_coefficients=entropy_coefficients,
            hidden_done=start,
        )
        for handle in pending:
            if handle is not None:
                handle.wait()

    def recompute_gradients(
        self,
        x: Tensor,  # (N, H)
        weight: Tensor,  # (V_r, H)
        bias: Tensor | None,  # (V_r,)
        labels: Tensor,  # (N,)
        stats: RowStats,
        coefficients: Tensor | None,  # (N,)
        entropy_coefficients: Tensor | None,  # (N,)
        head: HeadSpec,
        options: CoreOptions,
        *,
        dhidden: Tensor | None,  # (N, H) written
        head_gradient: HeadGradient | None,
    ) -> None:
        local = labels - self.parallel.start
        # without a tile the exponentials are made relative to the offset of the whole row
        of_shard = self._of_shard(replace(stats, shard_k=None), local, local.clamp(0, len(weight) - 1))
        self.backend.recompute_gradients(
            x,
            weight,
            bias,
            local,
            of_shard,
            coefficients,
            entropy_coefficients,
            head,
            options,
            dhidden=dhidden,
            head_gradient=head_gradient,
        )
        if dhidden is not None:
            self._add_up(dhidden)

    def _of_shard(self, stats: RowStats, local: Tensor, own: Tensor) -> RowStats:
        """The statistics relative to this rank's offset; without a target where another rank has it. local, own (N,)."""
        shift: Tensor | float = 0.0
        grow: Tensor | float = 1.0
        k = stats.k
        if stats.shard_k is not None:
            k = stats.shard_k
            shift = (stats.k - k).clamp(max=_LARGEST_SHIFT[k.dtype])
            grow = shift.exp()
        here = own == local
        return replace(
            stats,
            k=k,
            sum_others=torch.where(here, stats.sum_others * grow, 0),
            log_denom=stats.log_denom + shift,
            target_offset=torch.where(here, stats.target_offset + shift, -torch.inf),
        )

    def _add_up(self, dhidden: Tensor) -> Tensor:
        """Add up partial gradients of the hidden states; sequence-parallel ones are added up where they are scattered."""
        return dhidden if self.parallel.sequence_parallel else sum_(dhidden, self.group)
