"""The predicted cost of a call on a GPU: FLOP, bytes and seconds, from a few constants of its architecture.

A GEMM takes the longer of its FLOP and its bytes, an element-wise pass the longer of its bytes and its exponentials, and each
launch some time more. Each backend's ``predict`` fills a :class:`Sheet`; what all of them share is here.

Also counted: operands as often as blocks read them, 8 VH for each time that a tile or a chunk of tokens adds to dW in
float32, and what touches rows of X, dX and dW. Not modelled: bias, soft-cap, other statistics, weights of another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..core.blocking import ROW_ELEMENTS, VOCAB_BLOCK
from .gpu_constants import Gpu

#: How much faster than memory a pass reads and writes a block that fits half of the L2 cache. Assumed.
_L2_SPEED = 2.0


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


class Sheet:
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

    def gradients(self, sizes: Sizes, makes_dx: bool, makes_dw: bool, accumulates: bool) -> None:
        """The GEMMs of dX and dW."""
        n, h, v, operand, acc, g = sizes.tokens, sizes.hidden, sizes.vocab, sizes.operand, sizes.acc, sizes.gradient
        if makes_dx:
            moved = g * n * v + operand * v * h * sizes.times_w + 2 * acc * n * h * sizes.times_x
            self.gemm("dX GEMM", 2 * n * h * v, moved, sizes.times_x * sizes.times_w)
        if makes_dw:
            moved = g * n * v + operand * n * h * sizes.times_x + (2 * acc * sizes.times_w if accumulates else operand) * v * h
            launches = ceil(v, VOCAB_BLOCK) * sizes.times_w if sizes.in_tile and accumulates else sizes.times_x * sizes.times_w
            self.gemm("dW GEMM", 2 * n * h * v, moved, launches)

    def rows(self, sizes: Sizes, makes_dx: bool, makes_dw: bool, bytes_per_element: int, spans: int) -> None:
        """Passes over rows of X and dX: ``bytes_per_element`` of the backend's own, in ``spans`` passes over spans of rows."""
        if makes_dx:  # zeroed, scaled, rounded to its place
            bytes_per_element += 4 * sizes.acc + sizes.operand
        if makes_dw:  # X times its rows' coefficients
            bytes_per_element += (2 * sizes.operand + 2 * sizes.acc) * sizes.times_x
        elements = sizes.tokens * sizes.hidden
        self.elementwise("rows of X and dX", bytes_per_element * elements, 6 + spans * ceil(elements, ROW_ELEMENTS))

    def scaling(self, sizes: Sizes, weight_size: int, collected: bool, accumulates: bool) -> None:
        """dW, zeroed and rounded where it is collected in float32, and multiplied by the upstream gradient."""
        acc = sizes.acc
        per_element = 2 * acc + weight_size if collected else 2 * weight_size + accumulates * (2 * acc + weight_size)
        self.elementwise("scaling of dW", per_element * sizes.vocab * sizes.hidden, 2)


@dataclass(frozen=True)
class Sizes:
    """What the parts of a cost are computed from.

    Attributes:
        tokens, hidden, vocab: N, H, V.
        operand, acc, gradient: bytes of an element of the GEMMs' operands, of the sums, and of a block of the gradient.
        in_tile: whether the gradients are made from finished tiles.
        times_x, times_w: how often the gradients' GEMMs read X and W.
    """

    tokens: int
    hidden: int
    vocab: int
    operand: int
    acc: int
    gradient: int
    in_tile: bool
    times_x: int
    times_w: int


def ceil(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


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
