"""Run as a script where Triton's functions are not interpreted: prints what tests want to know of the kernels, as JSON.

``drift``: differences between what launch.py passes and what shipped.py says that it passes. ``all`` and ``quick``: what is
compiled, and the few that stand for it.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from unittest import mock

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import logitless as ll
from logitless.bench.compile_report import targets
from logitless.kernels.backends.triton.aot import shipped
from logitless.kernels.backends.triton.aot.compilation import Compilation
from logitless.kernels.backends.triton.gemm import launch
from logitless.kernels.backends.triton.tuning.configs import GemmConfig, table
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS, CoreOptions

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1"}
NAMES |= {dtype: name for name, dtype in TYPES.items()}
N, W, H = 64, 512, 128


class Recorder:
    """Stands for a kernel: keeps what it would be launched with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.given = kernel, {}

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **named) -> None:
        self.given = {**dict(zip(self.kernel.arg_names, arguments)), **named}

    def compilation(self) -> tuple[dict, dict, dict]:
        """Signature, constants and options, as ``JITFunction`` would have them."""
        constants, signature, options = {}, {}, {}
        compile_time = {p.name for p in self.kernel.params if p.is_constexpr}
        for name, value in self.given.items():
            if name not in self.kernel.arg_names:
                options[name] = value
            elif name in compile_time or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{value.block_shape}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{NAMES[value.dtype]}"
            else:
                signature[name] = {int: "i32", float: "fp32"}[type(value)]
        return signature, constants, options


def launches(config: GemmConfig, dtype: str, unaligned: bool) -> dict[str, Recorder]:
    """By the beginning of the name that shipped.py gives to them."""
    found: dict[str, Recorder] = {}
    kind = TYPES[dtype]

    def matrix(rows: int) -> torch.Tensor:  # of rows that start where descriptors can
        return torch.zeros(rows, H + 1 if unaligned else H, dtype=kind)[:, 1 if unaligned else 0 :]

    hidden = H if not unaligned else H - 1  # no multiple of BLOCK_H
    x, weight, bias = matrix(N)[:, :hidden], matrix(W)[:, :hidden], torch.zeros(W, dtype=kind)
    labels, row = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    tile = torch.zeros(N, W, dtype=torch.float32 if dtype == "fp16" else kind)
    gradient = torch.zeros(N, W, dtype=kind)
    sums, stats = torch.zeros(7, N, dtype=torch.float64), torch.zeros(7, N)
    plain, top1 = CoreOptions(), torch.zeros(N, dtype=torch.bool)
    everything = CoreOptions(outputs=frozenset(OPTIONAL_OUTPUTS), grad_filter=1e-4)
    capped = ll.HeadSpec(softcap=30.0)

    def record(names: tuple[str, ...], kernels: tuple[str, ...], call, *arguments, **named) -> None:
        with ExitStack() as patches:
            recorders = [Recorder(getattr(launch, kernel)) for kernel in kernels]
            for kernel, recorder in zip(kernels, recorders):
                patches.enter_context(mock.patch.object(launch, kernel, recorder))
            call(*arguments, **named)
        found.update({name: recorder for name, recorder in zip(names, recorders) if name})

    def score(names: tuple[str, str], bias, sums, stats, top1, head, options, **named) -> None:
        given = x, weight, bias, labels, row, row, sums, stats, top1, head, options, config
        kernels = ("score_kernel", "combine_kernel")
        record(names, kernels, launch.score_block, *given, **{"first": 0, "vocab_size": W, **named})

    linear = ll.HeadSpec()
    score(("score_logps", "combine_only"), None, None, stats, None, linear, plain)
    score(("score_tile", ""), None, None, stats, None, linear, plain, gradient=tile)
    score(("score_all", "combine_first"), bias, sums, None, None, linear, everything, gradient=tile)
    score(("score_all_softcap", "combine_last"), bias, sums, stats, top1, capped, everything, gradient=tile, first=64)
    for name, head in (
        ("gradient_plain", linear),
        ("gradient_plain_softcap", capped),
        ("gradient_all", linear),
        ("gradient_all_softcap", capped),
    ):
        full = name.startswith("gradient_all")
        optional = (bias if full else None, labels, row, torch.zeros(2, N) if full else None, row if full else None, row)
        given = x, weight, *optional, gradient, head, everything if full else plain, config
        record((name,), ("gradient_kernel",), launch.gradient_block, *given, first=0)
    active = torch.zeros(-(-N // config.BLOCK_N), -(-W // config.BLOCK_V), dtype=torch.int8)
    for name, operand, out, transposed, accumulate in (
        ("filtered_rows", weight, torch.zeros(N, hidden), False, True),
        ("filtered_weight", x, torch.zeros(W, hidden, dtype=kind), True, False),
        ("filtered_weight_added", x, torch.zeros(W, hidden), True, True),
    ):
        how = {"transposed": transposed, "accumulate": accumulate}
        record((name,), ("filtered_kernel",), launch.filtered_mm, gradient, operand, out, active, config, **how)
    return found


def difference(declared: Compilation, recorder: Recorder) -> str:
    """What distinguishes them, or nothing."""
    signature, constants, options = recorder.compilation()
    wanted = {"num_warps": declared.num_warps, "num_stages": declared.num_stages, **launch.OPTIONS}
    options.setdefault("num_stages", shipped.DEFAULT_STAGES)
    said = (declared.signature, declared.constexprs, wanted)
    pairs = zip(("types", "constants", "options"), said, (signature, constants, options))
    return "; ".join(f"{what}: {set(a.items()) ^ set(b.items())}" for what, a, b in pairs if a != b)


def drift() -> dict[str, str]:
    """Differences by the name of a declaration; one that stands for no launch is a difference too."""
    found = {}
    patches = {
        "multiprocessors": lambda device: 132,
        "input_precision": lambda dtype, device: "tf32x3" if dtype == torch.float32 else "ieee",
    }
    with ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(launch, name, function))
        for declared in shipped.compilations():
            config = getattr(declared, "config", None)
            if config is None:  # of which only the block sizes count
                size = "32" if "_fp32_" in declared.name else "16"
                some = table()["sm_80"][size][0]
                sizes = {key: declared.constexprs[key] for key in ("BLOCK_OUT", "BLOCK_IN") if key in declared.constexprs}
                pair = tuple(sizes.values()) if declared.constexprs.get("TRANSPOSED") is False else tuple(sizes.values())[::-1]
                config = dataclasses.replace(some, **dict(zip(("BLOCK_N", "BLOCK_V"), pair)))
            dtype = "bf16" if declared.kernel is launch.combine_kernel else declared.dtype
            known = launches(config, dtype, declared.name.endswith("_unaligned"))
            start = declared.name.partition(f"_{declared.dtype}_")[0]
            text = difference(declared, known[start]) if start in known else f"no launch is called {start}"
            if text:
                found[declared.name] = text
    return found


if __name__ == "__main__":
    print(json.dumps({"drift": drift(), "all": list(targets(quick=False)), "quick": list(targets(quick=True))}))
