"""Which dtype each stage of the core works in."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums, statistics and gradients in the making: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """GEMM operands. fp16 GEMMs are emulated on a CPU: float32 is 2.6 times faster there (measured, AVX512), and exact."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def logits_gemm_dtype(dtype: torch.dtype, device: torch.device, precision: str) -> torch.dtype:
    """Operands of the GEMM that makes the logits; ``precision="float32"`` needs wider ones on a CPU, whose GEMM rounds."""
    dtype = gemm_dtype(dtype, device)
    return torch.float32 if precision == "float32" and dtype.itemsize == 2 and device.type == "cpu" else dtype


def tile_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A kept gradient tile. fp16 cannot hold exp(z - k): such a tile stays float32 until its GEMM."""
    dtype = gemm_dtype(dtype, device)
    return torch.float32 if dtype == torch.float16 else dtype


_ROUNDING = {torch.bfloat16: 1, torch.float16: 2}


def rounding(dtype: torch.dtype, precision: str) -> int:
    """How kernels round logits under ``precision`` for hidden states of that dtype: 0 not, 1 to bfloat16, 2 to float16."""
    return _ROUNDING.get(dtype, 0) if precision == "match" else 0
