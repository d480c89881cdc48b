"""Every specialisation of the GEMM kernels that matters, for each configuration of configs.json, beside those of all others.

What launch.py passes is declared here a second time, so that it can be compiled without tensors and without a GPU; tests
hold the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ....core.stats import OPTIONAL_OUTPUTS
from .. import entropy, gae, passes, rows
from ..compat import gemm_warps
from ..gemm.combine import combine_kernel
from ..gemm.filtered import filtered_kernel
from ..gemm.kernels import gradient_kernel, score_kernel
from ..gemm.launch import COMBINE_CHUNK, COMBINE_ROWS, PartialRows, epilogue
from ..tuning.configs import GemmConfig, table
from .compilation import Compilation, aligned

#: The architectures whose configurations must not spill.
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
#: Triton's own, where a launch does not say.
DEFAULT_STAGES = 3

_SIZES = ("num_tokens", "num_entries", "hidden_size", "first", "x_stride", "w_stride", "gradient_stride", "v_blocks")
_TYPES = {
    **dict.fromkeys((*_SIZES, "vocab_size", "g_stride", "b_stride", "out_stride"), "i32"),
    **dict.fromkeys(("inner_size", "out_size", "columns_of_list"), "i32"),
    **dict.fromkeys(("scale", "cap", "threshold"), "fp32"),
    **dict.fromkeys(("k", "zy", "partial", "stats", "mix", "at_target", "row_scale"), "*fp32"),
    "labels": "*i64",
    "sums": "*fp64",
    "is_top1": "*i1",
    "active": "*i8",
    "places": "*i32",
    "counts": "*i32",
}
#: Of which nothing is known where a row of an operand does not start at a multiple of 16 bytes.
_OPERANDS = ("x", "w", "x_stride", "w_stride", "hidden_size", "g", "b", "g_stride", "b_stride")


@dataclass(frozen=True)
class GemmCompilation(Compilation):
    """One of a kernel that has a configuration."""

    config: GemmConfig | None = None


def all_compilations() -> list[Compilation]:
    """Of every kernel that is shipped."""
    others = (rows, passes, entropy, gae)
    return [*(one for module in others for one in module.compilations()), *compilations()]


def compilations() -> list[Compilation]:
    """Of the GEMM kernels, of filtered products, and of the kernel that adds the blocks' sums."""
    found: list[Compilation] = list(_combine())
    for name, architecture in ARCHITECTURES.items():
        blocks = []  # of filtered products, which rows of the table may share
        for size, configs in table()[name].items():
            for config in configs:
                found += _gemm(config, size == "32", architecture)
                if (size, config.BLOCK_N, config.BLOCK_V) not in blocks:
                    blocks.append((size, config.BLOCK_N, config.BLOCK_V))
                    found += _filtered(config, size == "32", architecture)
    return found


def _unaligned(compilation: Compilation) -> Compilation:
    """The same for operands of which nothing is known."""
    names = compilation.kernel.arg_names
    attrs = {place: hints for place, hints in compilation.attrs.items() if names[place[0]] not in _OPERANDS}
    return replace(compilation, name=f"{compilation.name}{_UNALIGNED}", attrs=attrs)


def _gemm(config: GemmConfig, wide: bool, architecture: int) -> Iterator[Compilation]:
    """Both kernels of gemm.py with a configuration.

    An operand that is aligned to 16 bytes comes by descriptor where the configuration has them, and else as a pointer known
    to be aligned. One that is not comes as a pointer of which nothing is known, in smaller blocks; its variants here leave
    out the soft-cap, whose epilogue alone takes a minute to compile.
    """
    nothing = PartialRows.of(frozenset(), False).constants()
    everything = PartialRows.of(frozenset(OPTIONAL_OUTPUTS), True).constants()
    plain = dict.fromkeys(("bias", "mix", "at_target", "row_scale", "active"))
    variants: tuple[tuple[Any, str, dict[str, Any], bool], ...] = (
        (score_kernel, "score_logps", {**nothing, "bias": None, "gradient": None}, False),
        (score_kernel, "score_tile", {**nothing, "bias": None}, False),
        (score_kernel, "score_all", everything, False),
        (score_kernel, "score_all_softcap", everything, True),
        (gradient_kernel, "gradient_plain", plain, False),
        (gradient_kernel, "gradient_plain_softcap", plain, True),
        (gradient_kernel, "gradient_all", {}, False),
        (gradient_kernel, "gradient_all_softcap", {}, True),
    )
    for dtype in ("fp32",) if wide else ("bf16", "fp16"):
        for kernel, name, constants, softcap in variants:
            if dtype == "fp16" and "_all" in name:  # as bfloat16, but for the type of what is loaded
                continue
            yield _one_gemm(kernel, config, name, dtype, constants, softcap, architecture)
            if dtype != "fp16" and name in ("score_logps", "score_all", "gradient_plain", "gradient_all"):
                slow = config.for_unaligned()
                yield _unaligned(_one_gemm(kernel, slow, name, dtype, constants, softcap, architecture, known=False))


def _one_gemm(
    kernel: Any,
    config: GemmConfig,
    name: str,
    dtype: str,
    constants: dict[str, Any],
    softcap: bool,
    architecture: int,
    known: bool = True,  # that operands are aligned, and the hidden size is a multiple of BLOCK_H
) -> GemmCompilation:
    # an fp16 tile is float32 until its GEMM
    gradient = "fp32" if dtype == "fp16" and kernel is score_kernel else dtype
    types = {**_TYPES, "bias": f"*{dtype}", "gradient": f"*{gradient}", "x": f"*{dtype}", "w": f"*{dtype}"}
    tma = config.tma and known
    if tma:
        types["x"] = f"tensordesc<{dtype}[{config.BLOCK_N}, {config.BLOCK_H}]>"
        types["w"] = f"tensordesc<{dtype}[{config.BLOCK_V}, {config.BLOCK_H}]>"
    how = {
        **constants,
        "SOFTCAP": softcap,
        **({"SLOPE": True} if kernel is score_kernel else {}),
        "MATCH": 0,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_V": config.BLOCK_V,
        "BLOCK_H": config.BLOCK_H,
        "GROUP": config.GROUP,
        "TMA": tma,
        "EVEN": known,
        **epilogue(kernel, config, softcap=softcap, known=known, filtered=constants.get("active", "given") is not None),
        "PRECISION": _precision(dtype),
    }
    blocks = f"{config.BLOCK_N}x{config.BLOCK_V}x{config.BLOCK_H}"
    num_warps = gemm_warps(config.BLOCK_N, config.BLOCK_V, config.num_warps)
    made = aligned(kernel, f"{name}_{dtype}_{blocks}", types, how, num_warps, config.num_stages, dtype)
    return GemmCompilation(**{**vars(made), "architectures": (architecture,), "config": config})


def _precision(dtype: str) -> str:
    """``launch.input_precision`` on an NVIDIA GPU, with torch's defaults."""
    return "tf32x3" if dtype == "fp32" else "ieee"


def _filtered(config: GemmConfig, wide: bool, architecture: int) -> Iterator[Compilation]:
    """What ``launch.filtered_mm`` passes: dX is added up in float32, dW is written in its own type or added to."""
    dtype = "fp32" if wide else "bf16"
    for name, transposed, accumulate, out in (
        ("rows", False, True, "fp32"),
        ("weight", True, False, dtype),
        ("weight_added", True, True, "fp32"),
    ):
        block_out, block_in = (config.BLOCK_V, config.BLOCK_N) if transposed else (config.BLOCK_N, config.BLOCK_V)
        constants = {
            "TRANSPOSED": transposed,
            "ACCUMULATE": accumulate,
            "BLOCK_OUT": block_out,
            "BLOCK_IN": block_in,
            "BLOCK_H": 64 if wide else 128,
            "STEP": min(block_in, 32 if wide else 64),
            "PRECISION": _precision(dtype),
        }
        types = {**_TYPES, "g": f"*{dtype}", "b": f"*{dtype}", "out": f"*{out}"}
        title = f"filtered_{name}_{dtype}_{block_out}x{block_in}"
        made = replace(aligned(filtered_kernel, title, types, constants, 8, 3, dtype), architectures=(architecture,))
        yield made
        if not transposed:
            yield _unaligned(made)


#: A name's beginning (up to the block sizes) of those that a quick look compiles: a few minutes instead of 20.
_REPRESENTATIVE = (
    "score_logps_bf16",
    "score_all_bf16",
    "gradient_plain_softcap_bf16",
    "gradient_all_bf16",
    "score_tile_fp32",
    "filtered_rows_bf16",
    "filtered_weight_bf16",
    "combine_last",
    "target_softcap_bf16",
    "finish_tile_bf16",
    "scan_all_bf16_bf16_softcap",
    "gradient_mixed_bf16_bf16_softcap",
    "mix_tile_softcap_bf16",
    "gae_masked_fp32",
)
#: The same of those whose names end so.
_UNALIGNED, _REPRESENTATIVE_UNALIGNED = "_unaligned", ("score_logps_bf16", "score_logps_fp32")


def is_representative(compilation: Compilation) -> bool:
    """Whether it is one of the few, of every kernel and configuration, that are compiled when time is short."""
    name = compilation.name.removesuffix(_UNALIGNED)
    starts = _REPRESENTATIVE if name == compilation.name else _REPRESENTATIVE_UNALIGNED
    return any(re.fullmatch(rf"{start}(_\d+x\d+(x\d+)?)?", name) for start in starts)


def _combine() -> Iterator[Compilation]:
    for name, outputs, first, factors, absent in (
        ("only", (), True, False, ("sums", "is_top1")),
        ("first", OPTIONAL_OUTPUTS, True, True, ("stats", "is_top1")),
        ("last", OPTIONAL_OUTPUTS, False, True, ()),
    ):
        constants = {
            **PartialRows.of(frozenset(outputs), factors).constants(),
            **dict.fromkeys(absent),
            "FIRST": first,
            "FACTORS": factors,
            "BLOCK_R": COMBINE_ROWS,
            "CHUNK": COMBINE_CHUNK,
        }
        yield aligned(combine_kernel, f"combine_{name}", _TYPES, constants, 4, DEFAULT_STAGES, "fp32")
