"""The three entry points of the backend ``triton``; ``torch/blockwise.py`` says what each computes.

dX and dW are products of the gradient tile by the vendor's GEMM or, with ``grad_filter``, by one that leaves out blocks.
float64 takes that blockwise algorithm, with its element-wise functions in Triton.
"""

from __future__ import annotations

from .recompute import recompute_gradients
from .score import score
from .tile_gradients import tile_gradients

__all__ = ["recompute_gradients", "score", "tile_gradients"]
