"""The element-wise functions that the engine calls on the chosen backend: those of ``ElementWise``, in Triton."""

from __future__ import annotations

from .entropy import mix_tile_
from .gae import gae
from .scaled import scaled_to_dtype
from .scatter import scatter_rows
from .segments import segment_sum

__all__ = ["gae", "mix_tile_", "scaled_to_dtype", "scatter_rows", "segment_sum"]
