"""How many blocks of the gradient ``settings(grad_filter=...)`` left out: counted on the device, read when asked for."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_lock = threading.Lock()
#: For each device: blocks left out, and all that were looked at.
_counts: dict[torch.device, Tensor] = {}


def count_blocks(active: Tensor) -> None:
    """Add blocks (0: left out) to the count, without a synchronisation. Backward passes do so on threads of their own."""
    with _lock:
        counts = _counts.get(active.device)
        if counts is None:
            counts = _counts[active.device] = torch.zeros(2, dtype=torch.int64, device=active.device)
        counts[0] += (active == 0).sum()
        counts[1] += active.numel()


def skipped_share(*, reset: bool = True) -> float:
    """The share of the gradient's blocks that ``settings(grad_filter=...)`` left out of the GEMMs of dX and dW.

    A block is some 128 tokens by 256 vocabulary entries. Waits for the devices.

    Args:
        reset: start to count again.

    Returns:
        float: of all blocks since the last reset, on all devices; 0 where none was looked at.

    Example:
        >>> skipped_share()
        0.0
    """
    with _lock:
        skipped, total = 0, 0
        for counts in _counts.values():
            a, b = counts.tolist()
            skipped, total = skipped + a, total + b
            if reset:
                counts.zero_()
    return skipped / total if total else 0.0
