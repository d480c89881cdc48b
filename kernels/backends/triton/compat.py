"""What differs between Triton 3.4 and 3.9, and whether it runs here at all. Nothing else asks for a version."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: The first Triton with descriptors in its tools and ``knobs``.
OLDEST = (3, 4)


def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@functools.cache
def why_no_triton() -> list[str]:
    """Every reason why Triton kernels cannot run in this process; also those of the interpreter."""
    try:
        import triton
    except ImportError as error:
        return [f"Triton does not import: {error}"]
    if _version() < OLDEST:
        return [f"Triton {triton.__version__} is too old, {'.'.join(map(str, OLDEST))} is needed"]
    if interpreted():
        return []
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return []
    return ["there is no GPU (TRITON_INTERPRET=1, set before Python starts, runs the kernels on a CPU, slowly)"]


def interpreted() -> bool:
    """Whether Triton's functions of this process run in its interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def gemm_warps(block_n: int, block_v: int, num_warps: int) -> int:
    """Of a program of a GEMM kernel, whose configuration says ``num_warps``.

    Where warps share a block's rows, halving it moves columns between them through shared memory: in Triton 3.4 128 KiB of
    it for a block of 64 x 256, which Hopper does not have beside the operands. There warps have rows of their own.
    """
    shared = block_n < 16 * num_warps and block_v > 128
    return max(4, block_n // 16) if shared and _version() < (3, 5) else num_warps


def descriptor_step(itemsize: int) -> int:
    """Of which the row stride of a tensor descriptor is a multiple, in elements: 16 bytes.

    The interpreters of Triton 3.4 and 3.5 want 16 elements, whatever their size.
    """
    return 16 if interpreted() and _version() < (3, 6) else 16 // itemsize


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches. Nothing on a CPU."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
