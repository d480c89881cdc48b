"""The specialisations of the element-wise kernels that matter: hidden sizes and vocabularies that are multiples of 16.

Tensors are of the meta device, so their sizes cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ....core.blocking import VOCAB_BLOCK
from ....core.dtypes import accumulate_dtype
from ....core.head_spec import HeadSpec
from ....core.row_head import RowHead
from ....core.stats import OPTIONAL_OUTPUTS, CoreOptions
from ...torch.passes import Logits
from ..entropy import mix_tile_launch
from ..finish import finish_rows_launch, finish_tile_launch
from ..gae import gae_launch
from ..logits_gradient import column_sums_launch, logits_gradient_launch
from ..scaled import scaled_to_dtype_launch
from ..scan import new_block_sums, scan_launch
from ..scatter import scatter_rows_launch
from ..segments import segment_sum_launch
from ..targets import target_launch
from .compilation import NAMES, Compilation, compilation

#: Tokens, hidden size, vocabulary size, segments: of which a kernel's code depends on divisibility alone.
N, H, V, S = 64, 4096, 32 * VOCAB_BLOCK, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLAIN, CAPPED = HeadSpec(), HeadSpec(softcap=30.0)


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


#: Heads whose tokens have temperatures of their own.
TEMPERED = RowHead(inverse_temperature=meta(N, dtype=torch.float32))
TEMPERED_CAPPED = RowHead(softcap=30.0, inverse_temperature=meta(N, dtype=torch.float32))


def kind_of(head: HeadSpec) -> str:
    """Part of a specialisation's name."""
    return "_softcap" * (head.softcap is not None) + "_tempered" * isinstance(head, RowHead)


def compilations() -> list[Compilation]:
    """The specialisations of every element-wise kernel."""
    found: list[Compilation] = []
    for dtype in DTYPES:
        found += _of_rows(dtype)
    for dtype in (torch.float32, torch.float64):
        launch = segment_sum_launch(meta(N, dtype=dtype), meta(S + 1), meta(S, dtype=dtype))
        found.append(compilation(f"segment_sum_{NAMES[dtype]}", launch, dtype))
    found += _of_logits()
    found += _of_entropies()
    found += _of_advantages()
    return found


def _of_rows(dtype: torch.dtype) -> Iterator[Compilation]:
    """Logits of the labels, finished tiles and rows, and copies of rows, for a model in that dtype."""
    acc, name = accumulate_dtype(dtype), NAMES[dtype]
    x, weight, labels, per_row = meta(N, H, dtype=dtype), meta(V, H, dtype=dtype), meta(N), meta(N, dtype=acc)
    for kind, head, k, slope in (
        ("raw", PLAIN, None, None),
        ("plain", PLAIN, per_row, None),
        ("softcap", CAPPED, per_row, per_row),
    ):
        launch = target_launch(x, weight, None, labels, "auto", head, per_row, k, slope)
        yield compilation(f"target_{kind}_{name}", launch, dtype)
    if dtype == torch.bfloat16:
        launch = target_launch(x, weight, None, labels, "auto", TEMPERED, per_row, per_row, None)
        yield compilation(f"target_tempered_{name}", launch, dtype)
    values = meta(N, H, dtype=acc)
    launch = finish_rows_launch(values, per_row, per_row, weight, labels, dtype)
    yield compilation(f"finish_rows_{name}", launch, dtype)
    factors = meta(V // VOCAB_BLOCK, N, dtype=acc)
    launch = finish_tile_launch(meta(N, V, dtype=dtype), factors, labels, per_row, VOCAB_BLOCK)
    yield compilation(f"finish_tile_{name}", launch, dtype)
    out, rows, factor = meta(N, H, dtype=dtype), meta(N), meta(1, dtype=acc)
    yield compilation(f"scatter_rows_{name}", scatter_rows_launch(values, rows, factor, None, out, acc), acc)
    launch = scatter_rows_launch(values, rows, per_row, values, out, acc)
    yield compilation(f"scatter_rows_base_{name}", launch, acc)
    yield compilation(f"scaled_to_dtype_{name}", scaled_to_dtype_launch(values, factor, out), acc)


def _of_logits() -> Iterator[Compilation]:
    """Passes over whole blocks of logits: sums alone, with the tile, and with all statistics; gradients; and their sums."""
    everything = frozenset(OPTIONAL_OUTPUTS)
    labels, span = meta(N), (0, VOCAB_BLOCK)
    for source_dtype, tile_dtype in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        k = meta(N, dtype=accumulate_dtype(source_dtype))
        source, tile = (meta(N, VOCAB_BLOCK, dtype=dtype) for dtype in (source_dtype, tile_dtype))
        logits = Logits(meta(N, H, dtype=source_dtype), meta(V, H, dtype=source_dtype), None, "auto")
        tempered = (TEMPERED, TEMPERED_CAPPED) if tile_dtype != source_dtype == torch.float32 else ()
        for head in (PLAIN, CAPPED, *tempered):
            suffix = f"{NAMES[source_dtype]}_{NAMES[tile_dtype]}{kind_of(head)}"
            for kind, outputs, destination in (
                ("sums", frozenset[str](), None),
                ("tile", frozenset[str](), tile),
                ("all", everything, tile),
            ):
                sums, options = new_block_sums(outputs, k), CoreOptions(outputs)
                launch = scan_launch(logits, head, options, source, destination, k, labels, sums, *span)
                yield compilation(f"scan_{kind}_{suffix}", launch, source_dtype)
            for kind, mix in (("plain", None), ("mixed", meta(2, N, dtype=k.dtype))):
                launch = logits_gradient_launch(logits, head, source, tile, k, labels, *span, mix, k)
                yield compilation(f"logits_gradient_{kind}_{suffix}", launch, source_dtype)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        acc = accumulate_dtype(dtype)
        launch = column_sums_launch(meta(N, VOCAB_BLOCK, dtype=dtype), meta(N, dtype=acc), meta(VOCAB_BLOCK, dtype=acc))
        yield compilation(f"column_sums_{NAMES[dtype]}", launch, dtype)


def _of_entropies() -> Iterator[Compilation]:
    """A bf16 tile, a float32 one (of fp16 and float32 operands), and float64, each with a soft-cap and without."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        acc = accumulate_dtype(dtype)
        for head in (PLAIN, CAPPED, *((TEMPERED_CAPPED,) if dtype == torch.bfloat16 else ())):
            launch = mix_tile_launch(meta(N, V, dtype=dtype), meta(2, N, dtype=acc), meta(N, dtype=acc), head)
            yield compilation(f"mix_tile{kind_of(head)}_{NAMES[dtype]}", launch, dtype)


def _of_advantages() -> Iterator[Compilation]:
    """With all optional arguments, and with none."""
    for dtype in (torch.float32, torch.float64):
        per_token, per_segment = meta(N, dtype=dtype), meta(S, dtype=dtype)
        for kind, mask, last in (("plain", None, None), ("masked", meta(N, dtype=torch.bool), per_segment)):
            launch = gae_launch(per_token, per_token, meta(S + 1), mask, 1.0, 0.95, last, per_token, per_token)
            yield compilation(f"gae_{kind}_{NAMES[dtype]}", launch, dtype)
