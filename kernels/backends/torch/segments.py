"""Sums over segments in plain torch operators."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """See :class:`~logitless.kernels.backends.interface.ElementWise`."""
    # without ``unsafe`` its checks synchronise
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.to(values.dtype)
