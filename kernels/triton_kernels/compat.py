"""What differs between Triton 3.5 and 3.9, and whether it runs here at all. Nothing else asks for a version."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


@functools.cache
def why_no_triton() -> list[str]:
    """Every reason why Triton kernels cannot run in this process; also those of the interpreter."""
    try:
        import triton
    except ImportError as error:
        return [f"Triton does not import: {error}"]
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 5):  # 3.4 does not come to an end with functions that call themselves, as epilogue.py's do
        return [f"Triton {triton.__version__} is too old, 3.5 is needed"]
    if interpreted():
        return []
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return []
    return ["there is no GPU (TRITON_INTERPRET=1, set before Python starts, runs the kernels on a CPU, slowly)"]


def interpreted() -> bool:
    """Whether Triton's functions of this process run in its interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches. Nothing on a CPU."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
