"""One scan over blocks of logits in plain torch operators: sums relative to the target, and exponentials in place."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...core.blocking import ROW_ELEMENTS, blocks, weight_block
from ...core.dtypes import accumulate_dtype, logits_gemm_dtype
from ...core.head_spec import HeadSpec
from ...core.row_head import head_rows
from ...core.stats import CoreOptions
from ...core.weight_rows import HeadRows
from ...tile.sums import FLOOR, RAISE_ABOVE, BlockSums
from ..interface import ElementWise
from .entropy import mix_tile_
from .gae import gae
from .rows import scaled_to_dtype, scatter_rows
from .segments import segment_sum


class Logits:
    """Makes blocks of raw logits for some tokens, in float32 where the hardware makes that cheap."""

    def __init__(self, x: Tensor, weight: Tensor | HeadRows, bias: Tensor | None, precision: str, multiple: int = 1) -> None:
        """``multiple``: of how many rows every GEMM is; the last ones may be padding, or be computed twice."""
        self.operand = logits_gemm_dtype(x.dtype, x.device, precision)
        self.x, self.weight, self.bias = x.to(self.operand), weight, bias
        self.multiple = multiple
        if multiple > 1:
            self.x = self.x.contiguous()  # a BLAS reads transposed operands by other kernels
        self.acc = accumulate_dtype(x.dtype)
        self.model_dtype = x.dtype
        self.match = precision == "match" and x.dtype.itemsize == 2
        # cuBLAS hands out its float32 accumulators on request; CPU GEMMs have no such output
        self.wide = x.is_cuda and self.operand.itemsize == 2 and not self.match
        self.dtype = self.acc if self.wide else self.operand

    @property
    def rows(self) -> int:
        """N, rounded up to the multiple."""
        return -(-len(self.x) // self.multiple) * self.multiple

    @functools.cached_property
    def _padded(self) -> Tensor:
        """x with rows of 0 up to the multiple, (rows, H)."""
        return torch.nn.functional.pad(self.x, (0, 0, 0, self.rows - len(self.x)))

    def block(self, v0: int, v1: int, out: Tensor) -> None:
        """Write ``x @ weight[v0:v1].T`` (N, v1 - v0), in ``self.dtype`` and without bias, to ``out``.

        ``out`` has N rows, or ``rows``: those beyond N get anything.
        """
        w = weight_block(self.weight, v0, v1, self.operand).t()
        n = len(self.x)
        if n % self.multiple == 0:
            self._multiply(self.x, w, out)
        elif len(out) == self.rows:
            self._multiply(self._padded, w, out)
        elif n > self.multiple:  # two GEMMs that have rows in common: no memory for padding
            last = max(1, n // (2 * self.multiple)) * self.multiple
            first = self.rows - last
            self._multiply(self.x[:first], w, out[:first])
            self._multiply(self.x[n - last :], w, out[n - last :])
        else:
            product = torch.empty((self.rows, v1 - v0), dtype=out.dtype, device=out.device)
            self._multiply(self._padded, w, product)
            out.copy_(product[:n])

    def _multiply(self, x: Tensor, w: Tensor, out: Tensor) -> None:
        if self.wide:
            torch.mm(x, w, out_dtype=self.acc, out=out)
        else:
            torch.mm(x, w, out=out)

    def wide_bias(self) -> Tensor | None:
        """The bias (V,) in the dtype of the sums, contiguous."""
        return None if self.bias is None else self.bias.to(self.acc).contiguous()

    def load(self, source: Tensor, z: Tensor, v0: int, v1: int) -> None:
        """Copy rows of a block to the float32 (float64) buffer ``z`` and add the bias."""
        if z.data_ptr() != source.data_ptr():
            z.copy_(source)
        if self.bias is not None:
            z.add_(self.bias[v0:v1])
        if self.match:
            z.copy_(z.to(self.model_dtype))


def target_logits(x: Tensor, weight: Tensor | HeadRows, bias: Tensor | None, labels: Tensor, precision: str) -> Tensor:
    """Raw logits of the labels by an indexed dot product in float32 (float64). x (N, H), labels (N,) -> (N,)."""
    n, hidden = x.shape
    acc = accumulate_dtype(x.dtype)
    out = torch.empty(n, dtype=acc, device=x.device)
    for r0, r1 in blocks(n, max(1, ROW_ELEMENTS // max(1, hidden))):
        w = weight.index_select(0, labels[r0:r1]).to(x.dtype).to(acc)
        torch.sum(w.mul_(x[r0:r1]), dim=1, out=out[r0:r1])
    if bias is not None:
        out += bias.index_select(0, labels)
    return out.to(x.dtype).to(acc) if precision == "match" else out


def scan_block(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,  # (N, W) raw logits v0..v1
    destination: Tensor
    | None,  # (N, W), may be ``source``; gets exp(z - k) * (1 - tanh^2, unless slopes_later), 0 at the label
    zy: Tensor,  # (N,) target logits
    k: Tensor,  # (N,) zy, but finite
    labels: Tensor,  # (N,)
    v0: int,
    v1: int,
) -> BlockSums:
    n, width = source.shape
    gpu, want, acc = source.is_cuda, options.outputs, zy.dtype

    def new(name: str) -> Tensor | None:
        return torch.empty(n, dtype=acc, device=zy.device) if name in want else None

    sums = BlockSums(torch.empty_like(zy), new("entropy"), new("log_sum_sq_probs"), new("mean_logits"))
    if "is_top1" in want:
        sums.target, sums.before, sums.after = (torch.empty_like(zy) for _ in range(3))
    step = max(1, n if gpu else options.cache_elements // width)
    in_place = gpu and source.dtype == acc
    buffer = source if in_place else torch.empty((min(step, n), width), dtype=acc, device=zy.device)
    second = torch.empty_like(buffer) if sums.ez is not None or sums.ee is not None else None

    for r0, r1 in blocks(n, step):
        z, offset = buffer[: r1 - r0], k[r0:r1]
        column = labels[r0:r1, None] - v0
        inside = (column >= 0) & (column < width)
        column = column.clamp_(0, width - 1)
        overflowed = inside  # of the first attempt
        for attempt in range(2):
            logits.load(source[r0:r1], z, v0, v1)
            squared = head_rows(head, slice(r0, r1)).transform_(z)
            if attempt == 0 and sums.z is not None:
                torch.sum(z, dim=1, out=sums.z[r0:r1])
            target = z.gather(1, column)
            z.scatter_(1, column, torch.where(inside, -math.inf, target))
            if attempt == 0 and sums.target is not None and sums.before is not None and sums.after is not None:
                sums.target[r0:r1] = torch.where(inside, target, -math.inf)[:, 0]
                sums.before[r0:r1], sums.after[r0:r1] = _largest_beside(z, labels[r0:r1], v0)
            if gpu:  # a look at the sums would synchronise, so every row's maximum is taken
                top = z.amax(dim=1)
                offset = torch.where(top - offset > RAISE_ABOVE, top, offset)
            elif attempt == 1:
                offset = torch.where(overflowed, z.amax(dim=1), offset)
            z.sub_(offset[:, None])
            if second is None:
                z.exp_()
            else:
                work = second[: r1 - r0]
                if sums.ez is not None:
                    torch.clamp(z, min=FLOOR, out=work)
                z.exp_()
                if sums.ez is not None:
                    torch.sum(work.mul_(z), dim=1, out=sums.ez[r0:r1])
                if sums.ee is not None:
                    torch.sum(torch.mul(z, z, out=work), dim=1, out=sums.ee[r0:r1])
            torch.sum(z, dim=1, out=sums.e[r0:r1])
            if gpu or attempt == 1:
                break
            overflowed = ~(sums.e[r0:r1] <= math.exp(RAISE_ABOVE))
            if not bool(overflowed.any()):
                break
        if gpu or attempt == 1:
            sums.k = k.clone() if sums.k is None else sums.k
            sums.k[r0:r1] = offset
        if destination is not None:
            if squared is not None and not options.slopes_later:
                z.addcmul_(z, squared, value=-1)
            if not (in_place and destination is source):
                destination[r0:r1].copy_(z)
    return sums


def _largest_beside(z: Tensor, labels: Tensor, v0: int) -> tuple[Tensor, Tensor]:
    """The largest logit before and after the target of each row, -inf where there is none. z (N, W), its target masked."""
    top, at = z.max(dim=1)
    is_before = at + v0 < labels
    before, after = torch.where(is_before, top, -math.inf), torch.where(is_before, -math.inf, top)
    # Where the block holds the target, the largest on the other side of it may be equal: only then does it matter.
    inside = (labels >= v0) & (labels < v0 + z.shape[1]) & ~is_before
    if z.is_cuda or bool(inside.any()):
        rows = slice(None) if z.is_cuda else inside
        index = torch.arange(v0, v0 + z.shape[1], device=z.device)
        side = z[rows].masked_fill(index >= labels[rows, None], -math.inf).amax(dim=1)
        before[rows] = torch.maximum(before[rows], side)
    return before, after


def gradient_block(
    logits: Logits,
    head: HeadSpec,
    options: CoreOptions,
    source: Tensor,  # (N, W) raw logits v0..v1
    destination: Tensor,  # (N, W) gets exp(z - k) * (1 - tanh^2) * (mix[0] + mix[1] * (z - k)), ``at_target`` at the target
    k: Tensor,  # (N,) final
    labels: Tensor,  # (N,)
    v0: int,
    v1: int,
    mix: Tensor | None,  # (2, N); None: 1 and 0
    at_target: Tensor | None,  # (N,); None: 0
    dbias: Tensor | None,  # (W,), gets the destination's rows times ``scale`` added
    scale: Tensor,  # (N,)
) -> None:
    """The gradient of a block of logits whose statistics are known."""
    n, width = source.shape
    step = max(1, n if source.is_cuda else options.cache_elements // width)
    buffer = torch.empty((min(step, n), width), dtype=logits.acc, device=source.device)
    for r0, r1 in blocks(n, step):
        z = buffer[: r1 - r0]
        logits.load(source[r0:r1], z, v0, v1)
        squared = head_rows(head, slice(r0, r1)).transform_(z)
        z.sub_(k[r0:r1, None])
        if mix is None:
            z.exp_()
        else:
            factor = z.clamp(min=FLOOR).mul_(mix[1, r0:r1, None]).add_(mix[0, r0:r1, None])
            z.exp_().mul_(factor)
        if squared is not None:
            z.addcmul_(z, squared, value=-1)
        column = labels[r0:r1, None] - v0
        inside = (column >= 0) & (column < width)
        column = column.clamp_(0, width - 1)
        entry = torch.zeros((), dtype=z.dtype, device=z.device) if at_target is None else at_target[r0:r1, None]
        z.scatter_(1, column, torch.where(inside, entry, z.gather(1, column)))
        if dbias is not None:
            dbias.addmv_(z.t().to(dbias.dtype), scale[r0:r1].to(dbias.dtype))
        destination[r0:r1].copy_(z)


def finish_tile(
    tile: Tensor,  # (N, V)
    factors: list[Tensor | None],  # each (N,): what a block of ``width`` columns is multiplied by; None: 1
    labels: Tensor,  # (N,)
    at_target: Tensor | None,  # (N,), the entries of the labels; None: they stay
    width: int,
) -> None:
    """Bring all blocks of a finished tile to the common offset, and write its targets' entries."""
    for (v0, v1), factor in zip(blocks(tile.shape[1], width), factors, strict=True):
        if factor is None:
            continue
        if tile.is_cuda:
            tile[:, v0:v1].mul_(factor[:, None])
            continue
        for row in (factor != 1).nonzero()[:, 0].tolist():
            tile[row, v0:v1] *= factor[row]
    if at_target is not None:
        tile[torch.arange(len(tile), device=tile.device), labels] = at_target.to(tile.dtype)


TORCH_PASSES = ElementWise(
    target_logits=target_logits,
    scan_block=scan_block,
    gradient_block=gradient_block,
    finish_tile=finish_tile,
    mix_tile_=mix_tile_,
    scatter_rows=scatter_rows,
    scaled_to_dtype=scaled_to_dtype,
    segment_sum=segment_sum,
    gae=gae,
)
