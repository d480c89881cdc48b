"""Every specialisation of the GEMM kernels that matters, for each configuration of configs.json, beside those of all others.

What launch.py passes is declared here a second time, so that it can be compiled without tensors and without a GPU; tests
hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..stats import OPTIONAL_OUTPUTS
from . import passes, rows
from .combine import combine_kernel
from .compilation import Compilation, aligned
from .configs import GemmConfig, table
from .filtered import filtered_kernel
from .gemm import gradient_kernel, score_kernel
from .launch import COMBINE_CHUNK, COMBINE_ROWS, PartialRows

#: The architectures whose configurations must not spill.
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
#: Triton's own, where a launch does not say.
DEFAULT_STAGES = 3

_EVERYTHING = frozenset(OPTIONAL_OUTPUTS)
_LOGPS: frozenset[str] = frozenset()
_SIZES = ("num_tokens", "num_entries", "hidden_size", "first", "x_stride", "w_stride", "gradient_stride", "v_blocks")
_TYPES = {
    **dict.fromkeys((*_SIZES, "vocab_size", "g_stride", "b_stride", "out_stride"), "i32"),
    **dict.fromkeys(("inner_size", "out_size", "columns_of_list"), "i32"),
    **dict.fromkeys(("scale", "cap", "threshold"), "fp32"),
    **dict.fromkeys(("k", "zy", "partial", "stats", "mix", "at_target", "row_scale"), "*fp32"),
    **{"labels": "*i64", "sums": "*fp64", "is_top1": "*i1", "active": "*i8", "places": "*i32", "counts": "*i32"},
}
#: What an address or a row stride that is no multiple of 16 bytes takes from the kernel's knowledge.
_ALIGNED = ("x", "w", "x_stride", "w_stride", "hidden_size", "g", "b", "g_stride", "b_stride")


@dataclass(frozen=True)
class GemmCompilation(Compilation):
    """One of a kernel that has a configuration."""

    config: GemmConfig | None = None


def all_compilations() -> list[Compilation]:
    """Of every kernel that is shipped."""
    return [*rows.compilations(), *passes.compilations(), *compilations()]


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
    attrs = {place: hints for place, hints in compilation.attrs.items() if names[place[0]] not in _ALIGNED}
    return replace(compilation, name=f"{compilation.name}_unaligned", attrs=attrs)


def _gemm(config: GemmConfig, wide: bool, architecture: int) -> Iterator[Compilation]:
    """Both kernels of gemm.py with a configuration.

    Descriptors are passed where the configuration has them and both operands are aligned to 16 bytes, which needs no hint:
    an operand that is not comes as a pointer, of which nothing is known. Without descriptors both kinds of pointers are.
    """
    for dtype in ("fp32",) if wide else ("bf16", "fp16"):
        # an fp16 tile is kept in float32
        tile = {"bf16": "bf16", "fp16": "fp32", "fp32": "fp32"}[dtype]
        plain_gradient = {"bias": None, "mix": None, "at_target": None, "row_scale": None, "active": None}
        score = [
            ("logps", {"bias": None, "gradient": None, **PartialRows.of(_LOGPS, False).constants()}, False),
            ("tile", {"bias": None, **PartialRows.of(_LOGPS, False).constants()}, False),
            ("all", PartialRows.of(_EVERYTHING, True).constants(), False),
            ("all_softcap", PartialRows.of(_EVERYTHING, True).constants(), True),
        ]
        gradient: list[tuple[str, dict[str, Any], bool]] = [("plain", plain_gradient, False), ("all", {}, False)]
        gradient.append(("all_softcap", {}, True))
        variants = [(score_kernel, "score", tile, *v) for v in score]
        variants += [(gradient_kernel, "gradient", dtype, *v) for v in gradient]
        for kernel, kind, out, name, constants, softcap in variants:
            if dtype == "fp16" and name.startswith("all"):
                continue
            for tma in (True, False) if config.tma else (False,):
                for even in (True,) if tma else (False,) if config.tma else (True, False):
                    made = _one_gemm(kernel, config, f"{kind}_{name}", dtype, out, constants, softcap, tma, even, architecture)
                    yield made if tma or even else _unaligned(made)


def _one_gemm(
    kernel: Any,
    config: GemmConfig,
    name: str,
    dtype: str,
    gradient: str,
    constants: dict[str, Any],
    softcap: bool,
    tma: bool,
    even: bool,
    architecture: int,
) -> Compilation:
    types = {**_TYPES, "bias": f"*{dtype}", "gradient": f"*{gradient}", "x": f"*{dtype}", "w": f"*{dtype}"}
    if tma:
        types["x"] = f"tensordesc<{dtype}[{config.BLOCK_N}, {config.BLOCK_H}]>"
        types["w"] = f"tensordesc<{dtype}[{config.BLOCK_V}, {config.BLOCK_H}]>"
    how = {
        **constants,
        "SOFTCAP": softcap,
        "MATCH": 0,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_V": config.BLOCK_V,
        "BLOCK_H": config.BLOCK_H,
        "GROUP": config.GROUP,
        "PART": config.SOFTCAP_PART if softcap else config.PART,
        "TMA": tma,
        "EVEN": even,
        "FLATTEN": config.flatten,
        "PRECISION": _precision(dtype),
    }
    blocks = f"{config.BLOCK_N}x{config.BLOCK_V}x{config.BLOCK_H}"
    made = aligned(kernel, f"{name}_{dtype}_{blocks}", types, how, config.num_warps, config.num_stages, dtype)
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
        yield _unaligned(made)


def _combine() -> Iterator[Compilation]:
    for name, outputs, first, factors, absent in (
        ("only", _LOGPS, True, False, ("sums", "is_top1")),
        ("first", _EVERYTHING, True, True, ("stats", "is_top1")),
        ("last", _EVERYTHING, False, True, ()),
    ):
        constants = {
            **PartialRows.of(outputs, factors).constants(),
            **dict.fromkeys(absent),
            "FIRST": first,
            "FACTORS": factors,
            "BLOCK_R": COMBINE_ROWS,
            "CHUNK": COMBINE_CHUNK,
        }
        yield aligned(combine_kernel, f"combine_{name}", _TYPES, constants, 4, DEFAULT_STAGES, "fp32")
