"""Differences between Triton 3.4 and 3.9, and whether Triton can run here. No other file asks for Triton's version."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: The first version with tensor descriptors in ``triton.tools`` and with ``triton.knobs``.
OLDEST = (3, 4)


def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@functools.cache
def why_no_triton() -> list[str]:
    """Every reason why Triton kernels, interpreted or compiled, cannot run in this process; empty when they can."""
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
    """Whether the Triton functions of this process run in the interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def gemm_warps(block_n: int, block_v: int, num_warps: int) -> int:
    """The warps per program of a GEMM kernel whose configuration has ``num_warps``.

    Where several warps share the rows of a block, halving the block moves columns between them through shared memory. Triton
    3.4 takes 128 KiB of it for a block of 64 x 256, which Hopper does not have beside the operands, so there each warp gets
    rows of its own.
    """
    shared = block_n < 16 * num_warps and block_v > 128
    return max(4, block_n // 16) if shared and _version() < (3, 5) else num_warps


def descriptor_step(itemsize: int) -> int:
    """The number of elements (16 bytes) that divides the row stride of any matrix with a tensor descriptor.

    The interpreters of Triton 3.4 and 3.5 require 16 elements of any size.
    """
    return 16 if interpreted() and _version() < (3, 6) else 16 // itemsize


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; 1 in the interpreter, which runs one program after the other."""
    if interpreted():
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, where Triton launches. Does nothing for a CPU tensor."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
