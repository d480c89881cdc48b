"""The functions of ``ElementWise`` in Triton, which the engine and the blockwise algorithm call.

With them the blockwise algorithm of ``backends/torch`` serves float64: its GEMMs are the vendor's library's.
"""

from __future__ import annotations

from ..interface import ElementWise
from .entropy import mix_tile_
from .finish import finish_tile
from .gae import gae
from .logits_gradient import logits_gradient_block
from .scaled import scaled_to_dtype
from .scan import scan_block
from .scatter import scatter_rows
from .segments import segment_sum
from .targets import target_logits

TRITON_PASSES = ElementWise(
    target_logits=target_logits,
    scan_block=scan_block,
    gradient_block=logits_gradient_block,
    finish_tile=finish_tile,
    mix_tile_=mix_tile_,
    scatter_rows=scatter_rows,
    scaled_to_dtype=scaled_to_dtype,
    segment_sum=segment_sum,
    gae=gae,
)
