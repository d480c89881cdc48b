"""The specialisations of the GEMM kernels that matter, for each configuration of ``configs.json``.

Tensors are of the meta device, which stands for the GPU that the configuration is for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ....core.head_spec import HeadSpec
from ....core.stats import OPTIONAL_OUTPUTS, CoreOptions
from ..gemm.combine import STATS, PartialRows, combine_launch
from ..gemm.config import GemmConfig
from ..gemm.filtered import filtered_launch
from ..gemm.launch import recompute_launch, score_launch
from ..launch import Launch
from ..tuning.configs import table
from .compilation import NAMES, Compilation, compilation, gemm_compilation
from .elementwise import CAPPED, PLAIN, TEMPERED, TEMPERED_CAPPED, H, N, kind_of, meta

#: The architectures whose configurations must not spill.
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
#: Ends the name of a specialisation for operands whose rows do not start at multiples of 16 bytes.
UNALIGNED = "_unaligned"
#: Vocabulary entries: a multiple of every BLOCK_V.
W = 4096
EVERYTHING = CoreOptions(frozenset(OPTIONAL_OUTPUTS), grad_filter=1e-4)


def compilations() -> list[Compilation]:
    """The specialisations of the GEMM kernels, of filtered products, and of the kernel that adds the blocks' sums."""
    found = list(_combine())
    for name, architecture in ARCHITECTURES.items():
        blocks = []  # of filtered products, which rows of the table may share
        for size, configs in table()[name].items():
            for config in configs:
                found += _gemm(config, size == "32", architecture)
                if (size, config.BLOCK_N, config.BLOCK_V) not in blocks:
                    blocks.append((size, config.BLOCK_N, config.BLOCK_V))
                    found += _filtered(config, torch.float32 if size == "32" else torch.bfloat16, architecture)
    return found


def _matrix(rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> Tensor:
    """A matrix whose rows start at multiples of 16 bytes, or one about which Triton can infer nothing."""
    return meta(rows, columns, dtype=dtype) if aligned else meta(rows, columns + 1, dtype=dtype)[:, 1:columns]


def _gemm(config: GemmConfig, wide: bool, architecture: int) -> Iterator[Compilation]:
    """Both kernels of ``kernels.py`` with a configuration.

    An aligned operand comes by descriptor where the configuration has them, and otherwise as a pointer known to be aligned. An
    unaligned operand comes as a pointer without hints, in smaller blocks; these variants leave out the soft-cap, whose
    epilogue alone takes a minute to compile. Temperatures of tokens come with bfloat16; with all outputs, a soft-cap too.
    """
    variants = ("score_logps", "score_tile", "score_all", "recompute_plain", "recompute_all")
    for dtype in (torch.float32,) if wide else (torch.bfloat16, torch.float16):
        for variant in variants:
            if dtype == torch.float16 and variant.endswith("_all"):  # as bfloat16, except for the type of the loads
                continue
            for head in (PLAIN,) if variant in ("score_logps", "score_tile") else (PLAIN, CAPPED):
                yield _one_gemm(variant, config, dtype, head, architecture, aligned=True)
                if dtype != torch.float16 and variant != "score_tile" and head is PLAIN:
                    yield _one_gemm(variant, config, dtype, head, architecture, aligned=False)
            if dtype == torch.bfloat16:
                head = TEMPERED_CAPPED if variant.endswith("_all") else TEMPERED
                yield _one_gemm(variant, config, dtype, head, architecture, aligned=True)


def _one_gemm(
    variant: str, config: GemmConfig, dtype: torch.dtype, head: HeadSpec, architecture: int, *, aligned: bool
) -> Compilation:
    x, weight = _matrix(N, H, dtype, aligned), _matrix(W, H, dtype, aligned)
    launch_of = _score if variant.startswith("score_") else _recompute
    launch = launch_of(variant, x, weight, config, head)
    sizes = "x".join(str(launch.constants[name]) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_H"))
    name = f"{variant}{kind_of(head)}_{NAMES[dtype]}_{sizes}{'' if aligned else UNALIGNED}"
    return gemm_compilation(name, launch, dtype, architecture, config)


def _score(variant: str, x: Tensor, weight: Tensor, config: GemmConfig, head: HeadSpec) -> Launch:
    """Logits alone, with the tile, or with the tile and all statistics."""
    # an fp16 tile is float32 until its GEMM
    tile = meta(N, W, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    everything = variant == "score_all"
    options = EVERYTHING if everything else CoreOptions()
    rows = PartialRows.of(options.outputs, everything)
    partial = meta(rows.count, W // config.BLOCK_V, N, dtype=torch.float32)
    bias, gradient = meta(W, dtype=x.dtype) if everything else None, None if variant == "score_logps" else tile
    given = x, weight, bias, meta(N), meta(N, dtype=torch.float32), partial, gradient, rows, head, options, config
    return score_launch(*given, first=0)


def _recompute(variant: str, x: Tensor, weight: Tensor, config: GemmConfig, head: HeadSpec) -> Launch:
    """The gradient of log-probabilities, or a filtered one with all that is optional."""
    per_row, gradient = meta(N, dtype=torch.float32), meta(N, W, dtype=x.dtype)
    if variant == "recompute_plain":
        given = x, weight, None, meta(N), per_row, None, None, None, gradient, None, head, CoreOptions(), config
        return recompute_launch(*given, first=0)
    bias, mix, active = meta(W, dtype=x.dtype), meta(2, N, dtype=torch.float32), meta(1, 1, dtype=torch.int8)
    return recompute_launch(
        x, weight, bias, meta(N), per_row, mix, per_row, per_row, gradient, active, head, EVERYTHING, config, first=0
    )


def _filtered(config: GemmConfig, dtype: torch.dtype, architecture: int) -> Iterator[Compilation]:
    """Filtered products: dX is added up in float32; dW is written in its own dtype, or added to in float32."""
    for kind, transposed, accumulate, out_dtype in (
        ("rows", False, True, torch.float32),
        ("weight", True, False, dtype),
        ("weight_added", True, True, torch.float32),
    ):
        for aligned in (True,) if transposed else (True, False):
            g, b = _matrix(N, W, dtype, aligned), _matrix(N if transposed else W, H, dtype, aligned)
            out = meta(W if transposed else N, H, dtype=out_dtype)
            places = meta(16, 16, dtype=torch.int32)
            launch = filtered_launch(g, b, out, places, places[0], config, transposed=transposed, accumulate=accumulate)
            sizes = f"{launch.constants['BLOCK_OUT']}x{launch.constants['BLOCK_IN']}"
            name = f"filtered_{kind}_{NAMES[dtype]}_{sizes}{'' if aligned else UNALIGNED}"
            yield gemm_compilation(name, launch, dtype, architecture)


def _combine() -> Iterator[Compilation]:
    """The only block without statistics; the first and the last of several blocks with all of them."""
    k, top1 = meta(N, dtype=torch.float32), meta(N, dtype=torch.bool)
    sums, stats = meta(7, N, dtype=torch.float64), meta(len(STATS), N, dtype=torch.float32)
    for name, outputs, is_first, factors, earlier, written, is_top1 in (
        ("only", (), True, False, None, stats, None),
        ("first", OPTIONAL_OUTPUTS, True, True, sums, None, None),
        ("last", OPTIONAL_OUTPUTS, False, True, sums, stats, top1),
    ):
        rows = PartialRows.of(frozenset(outputs), factors)
        partial, how = meta(rows.count, 16, N, dtype=torch.float32), {"is_first": is_first, "factors": factors}
        launch = combine_launch(partial, k, k, earlier, written, is_top1, rows, vocab_size=W, **how)
        yield compilation(f"combine_{name}", launch, torch.float32)
