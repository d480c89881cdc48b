"""Run as a script where Triton's functions are not interpreted: prints what tests need to know of the kernels, as JSON.

``drift``: differences between what is compiled ahead of time and what Triton would compile when the library's functions launch
their kernels on tensors. ``all`` and ``quick``: what is compiled, and the few that stand for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import logitless as ll
from logitless.bench.compile_report import targets
from logitless.kernels.backends.torch.passes import Logits
from logitless.kernels.backends.triton.aot.compilation import DEFAULT_STAGES, Compilation
from logitless.kernels.backends.triton.aot.elementwise import DTYPES
from logitless.kernels.backends.triton.aot.elementwise import compilations as elementwise_compilations
from logitless.kernels.backends.triton.aot.gemms import UNALIGNED
from logitless.kernels.backends.triton.aot.gemms import compilations as gemm_compilations
from logitless.kernels.backends.triton.elementwise import TRITON_PASSES
from logitless.kernels.backends.triton.finish import finish_rows
from logitless.kernels.backends.triton.gemm import filtered, launch
from logitless.kernels.backends.triton.gemm.config import GemmConfig
from logitless.kernels.backends.triton.launch import Launch
from logitless.kernels.backends.triton.targets import target_logit_and_slope
from logitless.kernels.backends.triton.tuning.configs import table
from logitless.kernels.core.blocking import VOCAB_BLOCK
from logitless.kernels.core.dtypes import accumulate_dtype
from logitless.kernels.core.row_head import RowHead
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS, CoreOptions

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES = {name: dtype for dtype, name in NAMES.items()}
N, W, H = 64, 512, 128
PLAIN, CAPPED = ll.HeadSpec(), ll.HeadSpec(softcap=30.0)
TEMPERED, TEMPERED_CAPPED = (RowHead(softcap=cap, inverse_temperature=torch.ones(N)) for cap in (None, 30.0))
EVERYTHING = frozenset(OPTIONAL_OUTPUTS)


def launched(call: Callable[..., Any], *arguments: Any, **named: Any) -> list[Launch]:
    """What a function launches, none of which runs."""
    found: list[Launch] = []
    with mock.patch.object(Launch, "run", lambda self, *grid: found.append(self)):
        call(*arguments, **named)
    return found


def specialisation(given: Launch) -> dict[str, Any]:
    """By argument what Triton compiles for: type, value of a constant, and whether it is a multiple of 16; and the options."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(given.kernel.signature, given.kernel.params, backend)
    values, kinds, _ = bind(**given.arguments, **given.constants)
    found: dict[str, Any] = {"num_warps": given.num_warps, "num_stages": given.num_stages or DEFAULT_STAGES}
    for name, (kind, key) in zip(values, kinds, strict=True):
        if kind == "constexpr":
            found[name] = "constexpr", values[name]
        else:
            found[name] = kind.replace("u1", "i1"), isinstance(key, str) and "D" in key  # bool, by version
    return found


def declared(compilation: Compilation) -> dict[str, Any]:
    """The same of what is compiled ahead."""
    found: dict[str, Any] = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    for place, (name, kind) in enumerate(compilation.signature.items()):
        constant = kind == "constexpr"
        found[name] = kind, compilation.constexprs[name] if constant else (place,) in compilation.attrs
    return found


def elementwise_launches() -> dict[str, Launch]:
    """The launches of the element-wise functions, by the name that aot/TRITON_PASSES.py gives to each."""
    found: dict[str, Launch] = {}

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def add(names: str | list[str], call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        names = [names] if isinstance(names, str) else names
        found.update(zip(names, launched(call, *arguments, **named), strict=True))

    labels, bounds = zeros(N, dtype=torch.int64), torch.arange(17) * 4
    for dtype in DTYPES:
        acc, name = accumulate_dtype(dtype), NAMES[dtype]
        x, weight = zeros(N, 1024, dtype=dtype), zeros(W, 1024, dtype=dtype)
        values, per_row = zeros(N, 1024, dtype=acc), zeros(N, dtype=acc)
        given = x, weight, None, labels, "auto"
        add(f"target_raw_{name}", TRITON_PASSES.target_logits, *given)
        add(f"target_plain_{name}", target_logit_and_slope, *given, PLAIN)
        add(f"target_softcap_{name}", target_logit_and_slope, *given, CAPPED)
        if acc == torch.float32:
            add(f"target_tempered_{name}", target_logit_and_slope, *given, TEMPERED)
        add(f"finish_rows_{name}", finish_rows, values, per_row, per_row, weight, labels, dtype)
        tile = zeros(N, 32 * VOCAB_BLOCK, dtype=dtype)
        add(f"finish_tile_{name}", TRITON_PASSES.finish_tile, tile, [per_row] * 32, labels, per_row, VOCAB_BLOCK)
        rows = (2 * N, 1024), dtype, labels, values
        add(f"scatter_rows_{name}", TRITON_PASSES.scatter_rows, *rows, per_row[0])
        add(f"scatter_rows_base_{name}", TRITON_PASSES.scatter_rows, *rows, per_row, values)
        add(f"scaled_to_dtype_{name}", TRITON_PASSES.scaled_to_dtype, values, per_row[0], dtype, dtype == acc)
    for dtype in (torch.float32, torch.float64):
        name, values = NAMES[dtype], zeros(N, dtype=dtype)
        add(f"segment_sum_{name}", TRITON_PASSES.segment_sum, values, bounds)
        mask, last = zeros(N, dtype=torch.bool), zeros(16, dtype=dtype)
        add(f"gae_plain_{name}", TRITON_PASSES.gae, values, values, bounds, None, 1.0, 0.9, None, dtype)
        add(f"gae_masked_{name}", TRITON_PASSES.gae, values, values, bounds, mask, 1.0, 0.9, last, dtype)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        k = zeros(N, dtype=accumulate_dtype(dtype))
        for softcap, head in (("", PLAIN), ("_softcap", CAPPED), ("_softcap_tempered", TEMPERED_CAPPED)):
            tile, mix = zeros(N, W, dtype=dtype), zeros(2, N, dtype=k.dtype)
            add(f"mix_tile{softcap}_{NAMES[dtype]}", TRITON_PASSES.mix_tile_, tile, mix, k, head, CoreOptions())
    span = labels, 0, VOCAB_BLOCK
    for source, destination in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        k = zeros(N, dtype=accumulate_dtype(source))
        raw, tile = zeros(N, VOCAB_BLOCK, dtype=source), zeros(N, VOCAB_BLOCK, dtype=destination)
        logits = Logits(zeros(N, H, dtype=source), zeros(VOCAB_BLOCK, H, dtype=source), None, "auto")
        heads = {"": PLAIN, "_softcap": CAPPED, "_tempered": TEMPERED, "_softcap_tempered": TEMPERED_CAPPED}
        for softcap, head in heads.items():
            end = f"{NAMES[source]}_{NAMES[destination]}{softcap}"
            for name, outputs, to in (("sums", frozenset(), None), ("tile", frozenset(), tile), ("all", EVERYTHING, tile)):
                add(f"scan_{name}_{end}", TRITON_PASSES.scan_block, logits, head, CoreOptions(outputs), raw, to, k, k, *span)
            for name, mix in (("plain", None), ("mixed", zeros(2, N, dtype=k.dtype))):
                sums = f"column_sums_{NAMES[destination]}"
                dbias = zeros(VOCAB_BLOCK, dtype=accumulate_dtype(destination))
                given = logits, head, CoreOptions(), raw, tile, k, *span, mix, k, dbias, zeros(N, dtype=dbias.dtype)
                add([f"logits_gradient_{name}_{end}", sums], TRITON_PASSES.gradient_block, *given)
    return found


def gemm_launches(config: GemmConfig, dtype: str, unaligned: bool) -> dict[str, Launch]:
    """The launches of the GEMM kernels, by the beginning of the name that aot/gemms.py gives to each."""
    found: dict[str, Launch] = {}
    kind = TYPES[dtype]

    def matrix(rows: int) -> torch.Tensor:  # of rows that start where descriptors can
        return torch.zeros(rows, H + 1 if unaligned else H, dtype=kind)[:, 1 if unaligned else 0 :]

    hidden = H if not unaligned else H - 1  # no multiple of BLOCK_H
    x, weight, bias = matrix(N)[:, :hidden], matrix(W)[:, :hidden], torch.zeros(W, dtype=kind)
    labels, row = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    tile = torch.zeros(N, W, dtype=torch.float32 if dtype == "fp16" else kind)
    gradient = torch.zeros(N, W, dtype=kind)
    product = torch.zeros(N, W + 1, dtype=kind)[:, 1:] if unaligned else gradient
    sums, stats = torch.zeros(7, N, dtype=torch.float64), torch.zeros(7, N)
    plain, top1 = CoreOptions(), torch.zeros(N, dtype=torch.bool)
    everything = CoreOptions(outputs=EVERYTHING, grad_filter=1e-4)

    def score(names: tuple[str, str], bias, sums, stats, top1, head, options, **named) -> None:
        given = x, weight, bias, labels, row, row, sums, stats, top1, head, options, config
        made = launched(launch.score_block, *given, **{"first": 0, "vocab_size": W, **named})
        found.update({name: one for name, one in zip(names, made, strict=True) if name})

    score(("score_logps", "combine_only"), None, None, stats, None, PLAIN, plain)
    score(("score_tile", ""), None, None, stats, None, PLAIN, plain, gradient=tile)
    score(("score_logps_tempered", ""), None, None, stats, None, TEMPERED, plain)
    score(("score_tile_tempered", ""), None, None, stats, None, TEMPERED, plain, gradient=tile)
    score(("score_all", "combine_first"), bias, sums, None, None, PLAIN, everything, gradient=tile)
    score(("score_all_softcap", "combine_last"), bias, sums, stats, top1, CAPPED, everything, gradient=tile, first=64)
    score(("score_all_softcap_tempered", ""), bias, sums, None, None, TEMPERED_CAPPED, everything, gradient=tile)
    for name, head in (
        ("recompute_plain", PLAIN),
        ("recompute_plain_softcap", CAPPED),
        ("recompute_all", PLAIN),
        ("recompute_all_softcap", CAPPED),
        ("recompute_plain_tempered", TEMPERED),
        ("recompute_all_softcap_tempered", TEMPERED_CAPPED),
    ):
        full = name.startswith("recompute_all")
        optional = (bias if full else None, labels, row, torch.zeros(2, N) if full else None, row if full else None, row)
        given = x, weight, *optional, gradient, head, everything if full else plain, config
        (found[name],) = launched(launch.recompute_block, *given, first=0)
    active = torch.zeros(-(-N // config.BLOCK_N), -(-W // config.BLOCK_V), dtype=torch.int8)
    for name, operand, out, transposed, accumulate in (
        ("filtered_rows", weight, torch.zeros(N, H)[:, :hidden], False, True),
        ("filtered_weight", x, torch.zeros(W, hidden, dtype=kind), True, False),
        ("filtered_weight_added", x, torch.zeros(W, hidden), True, True),
    ):
        how = {"transposed": transposed, "accumulate": accumulate}
        (found[name],) = launched(filtered.filtered_mm, product, operand, out, active, config, **how)
    return found


def difference(compilation: Compilation, given: Launch | None) -> str:
    """What distinguishes them, or nothing."""
    if given is None:
        return "no launch has this name"
    a, b = declared(compilation), specialisation(given)
    return "; ".join(f"{name}: {a.get(name)}, launched {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name))


def config_of(compilation: Compilation) -> GemmConfig:
    """The configuration; of a kernel that has none, one with its block sizes."""
    if (config := getattr(compilation, "config", None)) is not None:
        return config
    some = table()["sm_80"]["32" if compilation.dtype == "fp32" else "16"][0]
    if "BLOCK_OUT" not in compilation.constexprs:
        return some
    sizes = compilation.constexprs["BLOCK_OUT"], compilation.constexprs["BLOCK_IN"]
    sizes = sizes[::-1] if compilation.constexprs["TRANSPOSED"] else sizes
    return dataclasses.replace(some, BLOCK_N=sizes[0], BLOCK_V=sizes[1])


def drift() -> dict[str, str]:
    """Differences by the name of what is compiled ahead."""
    found = {}
    launches = elementwise_launches()
    for compilation in elementwise_compilations():
        found[compilation.name] = difference(compilation, launches.get(compilation.name))
    with ExitStack() as stack:  # as on a GPU
        for module in (launch, filtered):
            precision = mock.Mock(side_effect=lambda dtype, device: "tf32x3" if dtype == torch.float32 else "ieee")
            stack.enter_context(mock.patch.object(module, "input_precision", precision))
        stack.enter_context(mock.patch.object(launch, "multiprocessors", return_value=132))
        for compilation in gemm_compilations():
            unaligned = compilation.name.endswith(UNALIGNED)
            dtype = "bf16" if compilation.name.startswith("combine_") else compilation.dtype
            start = compilation.name.partition(f"_{compilation.dtype}_")[0]
            launches = gemm_launches(config_of(compilation), dtype, unaligned)
            found[f"{compilation.name} {compilation.architectures}"] = difference(compilation, launches.get(start))
    return {name: text for name, text in found.items() if text}


if __name__ == "__main__":
    print(json.dumps({"drift": drift(), "all": list(targets(quick=False)), "quick": list(targets(quick=True))}))
