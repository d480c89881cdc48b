"""What the operators of ``kernels/operators/schemas.py`` mean, in float64, and how far a kernel may be from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.kernels.operators.schemas import SUMS

OUTPUT_BITS = {"ez": 1, "z": 2, "top": 4, "ee": 8}
EVERYTHING = sum(OUTPUT_BITS.values())
WITHOUT_SLOPE = 16
ROUNDING = (None, torch.bfloat16, torch.float16)
#: Relative error of one rounding to each type.
EPSILON = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Tile:
    """Arguments of ``tile_pass``. Outputs are written in place."""

    source: Tensor
    destination: Tensor | None
    labels: Tensor
    k: Tensor
    bias: Tensor | None = None
    sums: Tensor | None = None
    mix: Tensor | None = None
    at_target: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    first: int = 0
    outputs: int = 0
    rounding: int = 0
    inverse_temperature: Tensor | None = None

    def run(self, ops) -> None:
        ops.tile_pass(
            self.source,
            self.destination,
            self.bias,
            self.labels,
            self.k,
            self.sums,
            self.mix,
            self.at_target,
            self.inverse_temperature,
            self.logit_scale,
            self.softcap,
            self.temperature,
            self.first,
            self.outputs,
            self.rounding,
        )


@dataclass
class Expected:
    """What ``tile_pass`` should give, in float64; ``scale`` and ``terms`` are the sizes of what is added to get there."""

    destination: Tensor
    k: Tensor
    sums: Tensor | None
    terms: Tensor  # of the destination
    scale: dict[str, Tensor] = field(default_factory=dict)
    raised: Tensor | None = None


def new_sums(n: int, device: str | torch.device = "cpu") -> Tensor:
    sums = torch.zeros(len(SUMS), n, dtype=torch.float64, device=device)
    sums[SUMS.index("target") :] = -math.inf
    return sums


def expected_tile(t: Tile) -> Expected:
    """Call before the operator runs: it overwrites its arguments."""
    acc = accumulate(t.source.dtype)
    width = t.source.shape[1]
    r = t.source.to(acc)
    if t.bias is not None:
        r = r + t.bias[t.first : t.first + width].to(acc)
    if t.rounding:
        r = r.to(ROUNDING[t.rounding])
    r = r.double()
    z = r * t.logit_scale
    squared = torch.zeros_like(z)
    if t.softcap:
        squared = torch.tanh(z / t.softcap).square()
        z = t.softcap * torch.tanh(z / t.softcap)
    z = z / t.temperature
    if t.inverse_temperature is not None:
        z = z * t.inverse_temperature.double()[:, None]
    column = torch.arange(width, device=z.device) + t.first
    at = column == t.labels[:, None]
    others = z.masked_fill(at, -math.inf)
    k = t.k.double()
    limit = 11 if t.destination is not None and t.destination.dtype == torch.float16 else 30
    top = others.amax(dim=1)
    raised = (top - k > limit) if t.sums is not None else torch.zeros_like(top, dtype=torch.bool)
    old, k = k, torch.where(raised, top, k)
    d = others - k[:, None]
    e = d.exp()
    g = (z - k[:, None]).exp()
    terms = g  # 1 - tanh^2 has an absolute error
    if not t.outputs & WITHOUT_SLOPE:
        g = g * (1 - squared)
    if t.mix is not None:
        parts = t.mix[0, :, None].double(), t.mix[1, :, None] * (z - k[:, None]).clamp(min=-1000)
        size = (z.abs() + k[:, None].abs()).clamp(max=1000)  # of what z - k is the difference of
        g, terms = g * (parts[0] + parts[1]), terms * (parts[0].abs() + t.mix[1, :, None].abs() * size)
    entry = torch.zeros_like(k) if t.at_target is None else t.at_target.double()
    expected = Expected(torch.where(at, entry[:, None], g), k, None, terms, raised=raised)
    if t.sums is not None:
        sums, shift = t.sums.clone(), old - k
        f = shift.exp()
        ez = d.clamp(min=-1000) * e
        bits = t.outputs
        if bits & OUTPUT_BITS["ez"]:
            sums[1] = (sums[1] + torch.where(f > 0, shift, 0) * sums[0]) * f + ez.sum(dim=1)
        if bits & OUTPUT_BITS["ee"]:
            sums[2] = sums[2] * f * f + e.square().sum(dim=1)
        if bits & OUTPUT_BITS["z"]:
            sums[3] += z.sum(dim=1)
        if bits & OUTPUT_BITS["top"]:
            sums[4] = torch.where(at.any(dim=1), z.masked_fill(~at, -math.inf).amax(dim=1), sums[4])
            left = column < t.labels[:, None]
            sums[5] = torch.maximum(sums[5], others.masked_fill(~left, -math.inf).amax(dim=1))
            sums[6] = torch.maximum(sums[6], others.masked_fill(left, -math.inf).amax(dim=1))
        sums[0] = sums[0] * f + e.sum(dim=1)
        expected.sums = sums
        expected.scale = {
            "ez": sums[0] + ez.abs().sum(dim=1) + sums[1].abs(),
            "z": z.nan_to_num(neginf=0).abs().sum(dim=1) + sums[3].nan_to_num(neginf=0).abs(),
        }
    return expected


def check_tile(t: Tile, expected: Expected) -> None:
    """Compares a finished tile. Errors are relative; exp turns the absolute rounding of z and k into a relative one."""
    acc = accumulate(t.source.dtype)
    unit = 2 * EPSILON[acc]
    sizes = torch.cat([expected.k.abs(), torch.ones_like(expected.k)]).nan_to_num(posinf=1).clamp(max=1e3)
    rtol = unit * (40 + 4 * float(sizes.amax()))
    torch.testing.assert_close(t.k.double(), expected.k, rtol=8 * unit, atol=8 * unit, equal_nan=True)
    if t.destination is not None:
        wanted, dtype = expected.destination, t.destination.dtype
        rounding = torch.where(expected.raised, 2.05, 1.02) * EPSILON[dtype]  # twice for what was written before the raise
        smallest = 2**-24 if dtype == torch.float16 else 1e-37
        limit = rtol * expected.terms.nan_to_num() + rounding[:, None] * wanted.abs() + smallest
        error = (t.destination.double() - wanted).abs()
        beyond = (dtype == torch.float16) & (wanted.abs() > 65504 - limit) & (t.destination == wanted.sign() * math.inf)
        wrong = ~((error <= limit) | beyond)
        assert not wrong.any(), f"{int(wrong.sum())} entries: {t.destination[wrong][:4]} should be {wanted[wrong][:4]}"
    if t.sums is not None:
        wanted = expected.sums
        torch.testing.assert_close(t.sums[[0, 2]], wanted[[0, 2]], rtol=2 * rtol, atol=1e-300)
        for row, name in ((1, "ez"), (3, "z")):
            finite = wanted[row].isfinite()
            error = (t.sums[row] - wanted[row])[finite].abs()
            assert (error <= 2 * rtol * expected.scale[name][finite] + 1e-300).all(), name
            assert torch.equal(t.sums[row][~finite], wanted[row][~finite]), name
        torch.testing.assert_close(t.sums[4:], wanted[4:], rtol=8 * unit, atol=8 * unit)


def expected_dot(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, match: bool) -> tuple[Tensor, Tensor]:
    """The result and the size of its terms."""
    w = weight[labels].to(x.dtype).double()
    out = (x.double() * w).sum(dim=1)
    scale = (x.double() * w).abs().sum(dim=1)
    if bias is not None:
        out, scale = out + bias[labels].double(), scale + bias[labels].double().abs()
    return (out.to(x.dtype).double() if match else out), scale


def finished_tile(tile: Tensor, factors: Tensor | None, labels: Tensor, at_target: Tensor | None, width: int) -> Tensor:
    """What ``finish_tile`` makes of a tile, to the bit."""
    out = tile.clone()
    if factors is not None:
        each = factors.repeat_interleave(width, dim=0)[: tile.shape[1]].t()
        out = torch.where(each == 1, tile, (tile.to(accumulate(tile.dtype)) * each).to(tile.dtype))
    if at_target is not None:
        out[torch.arange(len(tile), device=tile.device), labels] = at_target.to(tile.dtype)
    return out


def some_factors(blocks: int, n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Factors (blocks, n) of a tile: most are 1, some rows have none other, and one entry is 0."""
    factors = torch.rand(blocks, n, generator=g)
    factors[torch.rand(blocks, n, generator=g) < 0.6] = 1
    factors[:, ::3] = 1
    factors[-1:, -1:] = 0
    return factors.to(dtype)


@dataclass(frozen=True)
class PairCase:
    """Arguments of ``pair_loss`` besides tensors."""

    kind: int
    mean: bool
    beta: float = 0.3
    gamma: float = 0.0
    label_smoothing: float = 0.0
    scale: float = 1.0

    def renamed(self, **changes) -> PairCase:
        return replace(self, **changes)


def expected_pairs(
    case: PairCase, logps: Tensor, weights: Tensor | None, offsets: Tensor, ref_logps: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``losses``, ``sequence_logps`` and ``coefficients`` by autograd of the formulas, in float64."""
    leaf = logps.double().clone().requires_grad_()
    values = leaf
    if weights is not None:
        w = weights.double()
        values = torch.where(w != 0, leaf * w, 0)
    sums = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        total = values[start:stop].sum()
        sums.append(total / max(1, stop - start) if case.mean else total)
    sequence = torch.stack(sums)
    ratio = sequence if ref_logps is None else sequence - ref_logps
    delta = ratio[0::2] - ratio[1::2]
    if case.kind == 0:
        h = case.beta * delta - case.gamma
        losses = -(1 - case.label_smoothing) * F.logsigmoid(h)
        if case.label_smoothing:
            losses = losses - case.label_smoothing * F.logsigmoid(-h)
    elif case.kind == 1:
        losses = torch.relu(1 - case.beta * delta)
    else:
        losses = (delta - 1 / (2 * case.beta)) ** 2
    (gradient,) = torch.autograd.grad(case.scale * losses.sum(), leaf)
    if weights is not None:
        gradient = torch.where(weights != 0, gradient, 0)
    return losses.detach(), sequence.detach(), gradient
