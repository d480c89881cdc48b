"""Turns a finished tile of exponentials into the gradient of a loss that depends on the entropy too.

``d entropy / d z_v = -p_v (log p_v + entropy)`` needs the logit of each entry, not only its exponential. The tile still has
it: ``z_v - k = log e_v``. An exponential rounded to bfloat16 has a logarithm right to 0.004, as far as the rounded entry itself
is off relatively. So the entropy's gradient costs one more pass over the tile, and no GEMM. (Where the distribution is all but
uniform, the entropy's own gradient all but vanishes, and bfloat16 keeps a digit of it.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.blocking import blocks
from ...core.dtypes import accumulate_dtype
from ...core.head_spec import HeadSpec
from ...core.row_head import tanh_factor
from ...core.stats import CoreOptions
from ...tile.sums import FLOOR


def mix_tile_(
    tile: Tensor,  # (N, V) exponentials, the labels' entries anything; of the transposed layout (V, N)
    mix: Tensor,  # (2, N)
    k: Tensor,  # (N,)
    head: HeadSpec,
    options: CoreOptions,
    *,
    transposed: bool = False,
) -> None:
    """``e -> e * (mix[0] + mix[1] * log e) * (1 - tanh^2)`` in place; 0 stays 0."""
    acc = accumulate_dtype(tile.dtype)
    numbers = torch.stack((mix[0].to(acc), mix[1].to(acc), k.to(acc)))
    to_tanh = None if head.softcap is None else tanh_factor(head, numbers[2])
    elements = options.workspace // (4 * acc.itemsize) if tile.is_cuda else options.cache_elements // 2
    step = max(1, elements // max(1, tile.shape[1]))
    for r0, r1 in blocks(len(tile), step):
        constant, linear, offset = numbers[:, None, :] if transposed else numbers[:, r0:r1, None]
        e = tile[r0:r1].to(acc)
        d = e.log().clamp_(min=FLOOR)
        if to_tanh is not None:
            squared = (d + offset).mul_(to_tanh if transposed else to_tanh[r0:r1, None]).square_()
            e.addcmul_(e, squared.clamp_(max=1), value=-1)
        tile[r0:r1] = e.mul_(d.mul_(linear).add_(constant))
