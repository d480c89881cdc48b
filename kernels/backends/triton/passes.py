"""The passes of the blockwise algorithm in Triton, for float64: GEMMs by the vendor's library, the rest element-wise."""

from __future__ import annotations

from ..torch.passes import Passes
from .finish import finish_tile
from .logits_gradient import logits_gradient_block
from .scan import scan_block
from .targets import target_logits

TRITON_PASSES = Passes(target_logits, scan_block, logits_gradient_block, finish_tile)
