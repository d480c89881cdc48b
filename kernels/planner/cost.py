"""What a backend's work should take on a GPU: FLOP, bytes and seconds, from a few constants of its architecture.

A GEMM takes the longer of its FLOP and its bytes, an element-wise pass the longer of its bytes and its exponentials, and each
launch some time more. For N tokens, hidden size H and vocabulary V, in bfloat16:

==================  ==========================  ===========================  =======================================
work                cuda                        torch                        triton
==================  ==========================  ===========================  =======================================
logits, 2 NHV FLOP  cuBLAS, 4 NV bytes written  the same                     ``triton_gemm`` of cuBLAS's rate
exponentials        one pass: 4 NV bytes;       24 NV; 34 NV with G, 30 NV   in the epilogue, after the products (not
                    6 NV with G                 when the sums are known      behind them): time, but no bytes
sums, G             in the pass                 in the passes                16 N V/128 bytes of partial sums; 2 NV for G
dX, dW, 2 NHV each  cuBLAS from G, 2 NV bytes each
==================  ==========================  ===========================  =======================================

Also counted: operands as often as blocks read them, 8 VH for each time that a tile or a chunk of tokens adds to dW in
float32, and what touches rows of X, dX and dW. Not modelled: bias, softcap, other statistics, weights of another dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..backends.torch.passes import ROW_ELEMENTS
from ..core.dtypes import accumulate_dtype, tile_dtype
from .gpu_constants import Gpu, gpu_of
from .plan import VOCAB_BLOCK, block_shape, partial_sum_bytes

if TYPE_CHECKING:
    from ..backends.registry import Call

#: How much faster than memory a pass reads and writes a block that fits half of the L2 cache. Assumed.
_L2_SPEED = 2.0
#: Short kernels for each block of logits: what ``scan_block`` and ``combine`` launch beside the GEMM.
_SHORT = {"cuda": 8, "torch": 20}


class Part(NamedTuple):
    """One kind of work within a cost."""

    name: str
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """A prediction; ``parts`` add up to ``flops``, ``bytes`` and ``seconds``."""

    gpu: Gpu
    parts: tuple[Part, ...]

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.parts)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.parts)

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.parts)

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other; parts of one name become one."""
        merged = {p.name: p for p in self.parts}
        for p in other.parts:
            q = merged.get(p.name, Part(p.name, 0, 0, 0.0))
            merged[p.name] = Part(p.name, p.flops + q.flops, p.bytes + q.bytes, p.seconds + q.seconds)
        return Cost(self.gpu, tuple(merged.values()))


class _Sheet:
    """Collects the parts of a cost."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        self.gpu, self.dtype = gpu, dtype
        self.parts: list[Part] = []

    def gemm(self, name: str, flops: int, moved: int, launches: int, speed: float = 1.0) -> None:
        seconds = max(flops / (self.gpu.flops(self.dtype) * speed), moved / self.gpu.bandwidth)
        self.parts.append(Part(name, flops, moved, seconds + launches * self.gpu.launch_seconds))

    def elementwise(self, name: str, moved: int, launches: int, *, exponentials: int = 0, cached: int = 0) -> None:
        """``cached`` of the bytes moved meet a block that the L2 cache holds."""
        seconds = max((moved - cached + cached / _L2_SPEED) / self.gpu.bandwidth, exponentials / self.gpu.exponentials)
        self.parts.append(Part(name, 0, moved, seconds + launches * self.gpu.launch_seconds))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def predict(backend: str, call: Call, gpu: Gpu | None = None) -> Cost:
    """What the backend ``"cuda"``, ``"torch"`` or ``"triton"`` should take for a call; ``gpu`` replaces its constants."""
    return _predict(backend, call, gpu_of(call.device, call.architecture) if gpu is None else gpu)


@functools.lru_cache(maxsize=1024)
def _predict(backend: str, call: Call, gpu: Gpu) -> Cost:
    n, h, v = call.num_tokens, call.hidden_size, call.vocab_size
    operand, acc = call.dtype.itemsize, accumulate_dtype(call.dtype).itemsize
    g_size = tile_dtype(call.dtype, call.device).itemsize
    triton, known, makes_g = backend == "triton", call.work == "recompute", call.work != "forward"
    tokens, sheet = _ceil(n, call.tiles), _Sheet(gpu, call.dtype)  # tokens of a tile

    # blocks of logits, as torch_backend cuts them; triton's sums need a row of partial sums, and a block only for G
    if triton and call.work in ("forward", "tile"):
        rows, width = max(1, call.workspace // partial_sum_bytes(v)), v
    elif triton:
        rows, width = block_shape(tokens, v, g_size, call.workspace)
    else:
        rows, width = block_shape(tokens, v, acc + (g_size if known else acc), call.workspace)
    chunks, blocks = call.tiles * _ceil(tokens, rows), _ceil(v, width)
    read = operand * (n * h * blocks + v * h * chunks)
    if triton:
        sheet.gemm("logits GEMM", 2 * n * h * v, read + g_size * n * v * makes_g, chunks * blocks, gpu.triton_gemm)
        sheet.elementwise("exponentials of the epilogue", 0, 0, exponentials=n * v)
        if not known:
            sheet.elementwise("partial sums", 2 * n * partial_sum_bytes(v), 8 * chunks * blocks)
    else:
        sheet.gemm("logits GEMM", 2 * n * h * v, read + acc * n * v, chunks * blocks)
        touched, written = acc, g_size * makes_g
        if backend == "torch":
            touched = acc * (7 if makes_g else 6)
            written = g_size * (0 if not makes_g else 1 if known else 3)
        in_cache = min(rows, tokens) * width * acc <= gpu.l2_bytes // 2
        sheet.elementwise(
            "pass over the logits",
            (touched + written) * n * v,
            _SHORT[backend] * chunks * blocks,
            exponentials=n * v,
            cached=touched * n * v * in_cache,
        )

    in_tile = call.work == "tile"
    times_x, times_w = (1, call.tiles) if in_tile else (blocks, chunks)  # how often the gradients' GEMMs meet X and W
    makes_dx = call.work == "frozen" or (makes_g and call.train_hidden)
    makes_dw = call.work in ("tile", "recompute") and call.train_weight
    accumulates = call.accumulate or (known and chunks > 1)
    if makes_dx:
        moved = g_size * n * v + operand * v * h * times_w + 2 * acc * n * h * times_x
        sheet.gemm("dX GEMM", 2 * n * h * v, moved, times_x * times_w)
    if makes_dw:
        moved = g_size * n * v + operand * n * h * times_x + (2 * acc * times_w if accumulates else operand) * v * h
        launches = _ceil(v, VOCAB_BLOCK) * call.tiles if in_tile and accumulates else times_x * times_w
        sheet.gemm("dW GEMM", 2 * n * h * v, moved, launches)

    by_element, spans = 0, 0  # of rows of the hidden size: bytes an element, and times that torch goes over them in spans
    if not known:  # gathered, and multiplied by the labels' rows of the weight
        by_element += 4 * operand if backend != "torch" else 6 * operand + 4 * acc
        spans += 4 * (backend == "torch")
    if call.work == "frozen":
        by_element += operand + 2 * acc if triton else 4 * operand + 8 * acc + (2 * acc * blocks if backend == "torch" else 0)
        spans += 0 if triton else 5  # triton finishes its rows in one launch
    if makes_dx:  # zeroed, scaled, rounded to its place
        by_element += 4 * acc + operand
    if makes_dw:  # X times its rows' coefficients
        by_element += (2 * operand + 2 * acc) * times_x
    sheet.elementwise("rows of X and dX", by_element * n * h, 6 + spans * _ceil(n * h, ROW_ELEMENTS))
    if makes_dw:  # zeroed and rounded where it is collected in float32, and multiplied by the upstream gradient
        weight = call.weight_dtype.itemsize
        by_element = 2 * acc + weight if call.accumulate else 2 * weight + accumulates * (2 * acc + weight)
        sheet.elementwise("scaling of dW", by_element * v * h, 2)
    return Cost(gpu, tuple(sheet.parts))


_GEMMS = {1.0: "GEMM takes", 2.0: "two GEMMs take", 3.0: "three GEMMs take", 4.0: "four GEMMs take"}


def describe(name: str, costs: Mapping[str, Cost]) -> str:
    """In words: what the backend ``name`` should take and why, and what each other one would."""
    chosen = costs[name]
    gpu, mine = chosen.gpu, {p.name: p for p in chosen.parts}
    of = gpu.architecture if gpu.architecture != "default" else gpu.device
    gemms = [p for p in chosen.parts if p.flops]
    others = sorted((p for p in chosen.parts if not p.flops), key=lambda p: -p.seconds)
    count = chosen.flops / min(p.flops for p in gemms)
    text = (
        f"on {of} ({'' if gpu.measured else 'nothing '}measured) {name} should take {milliseconds(chosen.seconds)}: "
        f"its {_GEMMS.get(count, 'GEMMs take')} {milliseconds(sum(p.seconds for p in gemms))}, "
        + ", ".join(f"the {p.name} {milliseconds(p.seconds)}" for p in others[:2])
    )
    for other, cost in costs.items():
        if other == name:
            continue
        # where the most time is between them, in what the other one does
        gap = max(cost.parts, key=lambda p: p.seconds - (mine[p.name].seconds if p.name in mine else 0.0))
        before = mine.get(gap.name, Part(gap.name, 0, 0, 0.0))
        more = milliseconds(gap.seconds - before.seconds)
        text += f"; {other} would take {milliseconds(cost.seconds)}: {more} more for its {gap.name}"
        if not gap.flops and gap.bytes > before.bytes:
            text += f", which moves {(gap.bytes - before.bytes) / 1e9:.1f} GB more"
    return text


def milliseconds(seconds: float) -> str:
    """For people."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e3:.2g} ms"
