"""Block sizes: how a call's memory budget is split, and which blocks of logits the backends work in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .head_spec import HeadSpec
from .stats import CoreOptions
from .weight_rows import HeadRows

#: Vocabulary entries per block of logits: a block of 768 tokens fits a 32 MiB L3, and the GEMM runs at full speed.
VOCAB_BLOCK = 8192
#: Elements of [tokens, hidden] that are converted at a time.
ROW_ELEMENTS = 1 << 19
#: float32 buffers of the element-wise pass, in elements of its cache block: the block, a second one, the soft-cap's square.
PASS_BUFFERS = 3
#: Tokens of a batch-invariant GEMM are a multiple of this: BLAS libraries have other kernels for a few rows, which sum in other
#: orders. MKL on an AVX2 CPU has them for up to 7 rows (float32 and float64, H=64 to 1024, V=1000 to 8192).
ROW_MULTIPLE = 16
#: Tokens of a batch-invariant block on a CPU are at most this: the last block is copied to add rows of padding.
MOST_ROWS = 512
#: Tokens for which a batch-invariant call chooses what may depend on the shape alone (GPU backend, configuration of a kernel).
INVARIANT_TOKENS = 4096
_MIN_BLOCK = 256
_ROWS = 256
_CACHE_ELEMENTS = 1 << 20
_WORKSPACE = 32 << 20


def block_shape(
    num_tokens: int, vocab_size: int, bytes_per_element: int, workspace: int, invariant: bool = False
) -> tuple[int, int]:
    """Rows and columns of a block of logits that fits ``workspace`` bytes; columns shrink before rows fall below 256.

    ``invariant``: neither depends on the number of tokens, and rows are a multiple of ROW_MULTIPLE.
    """
    wanted = _ROWS if invariant else min(num_tokens, _ROWS)
    width = min(vocab_size, VOCAB_BLOCK)
    rows = max(1, workspace // (width * bytes_per_element))
    if rows < wanted:
        width = min(width, max(_MIN_BLOCK, workspace // (wanted * bytes_per_element)))
        rows = max(1, workspace // (width * bytes_per_element))
    if invariant:
        return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE), width
    return min(rows, max(1, num_tokens)), width


def core_options(
    memory_budget: int,
    outputs: frozenset[str],
    precision: str,
    itemsize: int,
    device: torch.device,
    grad_filter: float = 0.0,
    batch_invariant: bool | None = None,
) -> CoreOptions:
    """Split the budget: at most a quarter for the cache blocks of the element-wise pass; for blocks of logits the size of an L3
    cache on a CPU, or another quarter on a GPU, whose GEMMs need more rows. ``batch_invariant=True``: both are constants."""
    if batch_invariant:
        return CoreOptions(outputs, precision, _WORKSPACE, _CACHE_ELEMENTS, grad_filter, True)
    invariant = batch_invariant is None and device.type == "cpu"
    cache = min(_CACHE_ELEMENTS, max(256, memory_budget // (4 * PASS_BUFFERS * itemsize)))
    most = max(_WORKSPACE, memory_budget // 4) if device.type == "cuda" else _WORKSPACE
    workspace = min(most, max(1, memory_budget - cache * PASS_BUFFERS * itemsize))
    return CoreOptions(outputs, precision, workspace, cache, grad_filter, invariant)


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


def real_rows(weight: Any, bias: Tensor | None, head: HeadSpec) -> tuple[Any, Tensor | None]:
    """Weight and bias without the padding rows beyond ``head.vocab_size``: views, made outside of autograd."""
    entries = head.entries_of(len(weight))
    if entries == len(weight):
        return weight, bias
    return weight[:entries], None if bias is None else bias[:entries]


def weight_block(weight: Tensor | HeadRows, v0: int, v1: int, dtype: torch.dtype) -> Tensor:
    """Rows ``v0:v1`` of a head's weight in ``dtype``."""
    if isinstance(weight, HeadRows):
        return weight.block(v0, v1, dtype)
    block = weight[v0:v1]
    return block if block.dtype == dtype else block.to(dtype)
