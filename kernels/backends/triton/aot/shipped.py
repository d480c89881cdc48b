"""Every specialisation that is compiled ahead of time, and the few that stand for them when time is short."""

from __future__ import annotations

import re

from . import elementwise, gemms
from .compilation import Compilation, GemmCompilation

__all__ = ["GemmCompilation", "all_compilations", "is_representative"]

#: Beginnings, up to the block sizes, of the names that a quick check compiles: a few minutes instead of 20.
_REPRESENTATIVE = (
    "score_logps_bf16",
    "score_all_bf16",
    "recompute_plain_softcap_bf16",
    "recompute_all_bf16",
    "score_tile_fp32",
    "filtered_rows_bf16",
    "filtered_weight_bf16",
    "combine_last",
    "target_softcap_bf16",
    "finish_tile_bf16",
    "scan_all_bf16_bf16_softcap",
    "logits_gradient_mixed_bf16_bf16_softcap",
    "mix_tile_softcap_bf16",
    "gae_masked_fp32",
)
#: The same for names of unaligned operands.
_REPRESENTATIVE_UNALIGNED = ("score_logps_bf16", "score_logps_fp32")


def all_compilations() -> list[Compilation]:
    """The specialisations of every kernel."""
    return [*elementwise.compilations(), *gemms.compilations()]


def is_representative(compilation: Compilation) -> bool:
    """Whether it is one of the few, of every kernel and configuration, that are compiled when time is short."""
    name = compilation.name.removesuffix(gemms.UNALIGNED)
    starts = _REPRESENTATIVE if name == compilation.name else _REPRESENTATIVE_UNALIGNED
    return any(re.fullmatch(rf"{start}(_\d+x\d+(x\d+)?)?", name) for start in starts)
