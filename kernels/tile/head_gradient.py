"""The gradient of the head's weight and bias, while it is being made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.weight_rows import HeadRows, trained_part
from .gemm import mm_accumulate

_ELEMENTS = 1 << 19  # of [tokens, hidden] that are widened at a time


class HeadGradient:
    """Collects ``dW`` (V, H) and ``db`` (V,). Of a weight with an adapter, ``dW`` is the gradient of B (V, r) alone.

    With ``accumulate`` the sums are kept in float32 (float64 for float64 weights) until :meth:`finish` scales and rounds
    them once; error then does not depend on the number of tiles, and a loss scale cannot underflow. Without it each block
    of rows is written exactly once, in the weight's dtype, and no float32 buffer of the weight's size exists.

    Attributes:
        weight, bias: what is collected, ``None`` where it is not needed: the first ``entries`` rows.
        whole_weight, whole_bias: all rows, 0 from ``entries`` on (the padding rows of a head).
        adapter_inputs: (N, r) of the next call's tokens, ``JoinedRows.inputs``: x holds them rounded to its dtype.
    """

    def __init__(
        self,
        weight: Tensor | HeadRows,
        bias: Tensor | None,
        *,
        need_weight: bool,
        need_bias: bool,
        accumulate: bool,
        entries: int | None = None,  # HeadSpec.vocab_size; None: V
    ) -> None:
        trained = trained_part(weight)
        dtype = weight.dtype if trained is None else trained.dtype
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.accumulate = accumulate
        self.columns = weight.shape[1] if trained is None else trained.shape[1]
        self.low_rank = self.columns < weight.shape[1]
        self.adapter_inputs: Tensor | None = None
        self.bias_dtype = bias.dtype if bias is not None else None
        self.whole_weight = self.whole_bias = self.weight = self.bias = None
        if need_weight:
            new = torch.zeros if accumulate else torch.empty
            shape = weight.shape[0], self.columns
            whole = new(shape, dtype=self.acc if accumulate else dtype, device=weight.device)
            self.whole_weight, self.weight = whole, whole[:entries]
            whole[len(self.weight) :].zero_()
        if need_bias:
            self.whole_bias = torch.zeros(weight.shape[0], dtype=self.acc, device=weight.device)
            self.bias = self.whole_bias[:entries]

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        """What dW is made of, for the rows x (n, K) of the call's tokens, from ``first`` on. (n, columns)."""
        if self.adapter_inputs is not None and not x.is_cuda:
            return self.adapter_inputs[first : first + len(x)]
        return x[:, x.shape[1] - self.columns :] if self.low_rank else x

    def operand(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of x for a product with blocks of that dtype: a CPU's GEMM would round a low-rank product to 16 bits."""
        return self.acc if self.low_rank and dtype.itemsize == 2 and device.type == "cpu" else dtype

    def add_product(self, rows: Tensor, g: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
        """``rows += factor * g.T @ x`` with rows (W, H) of dtype ``acc``, g (N, W), x (N, H)."""
        if g.dtype == x.dtype:
            mm_accumulate(rows, g.t(), x, factor)
            return
        step = max(1, _ELEMENTS // max(1, g.shape[1]))
        for r in range(0, len(g), step):
            mm_accumulate(rows, g[r : r + step].to(x.dtype).t(), x[r : r + step], factor)

    def add_weight(self, v0: int, v1: int, g: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
        """Rows v0..v1 of dW get ``factor * g.T @ x``. g (N, v1 - v0), x (N, columns) from :meth:`inputs`; factor 0-dim."""
        assert self.weight is not None
        rows = self.weight[v0:v1]
        if self.accumulate:
            self.add_product(rows, g, x, factor)
        elif g.dtype == rows.dtype == x.dtype and factor is None:
            torch.mm(g.t(), x, out=rows)
        else:
            block = torch.zeros(rows.shape, dtype=self.acc, device=rows.device)
            self.add_product(block, g, x, factor)
            rows.copy_(block)

    def add_rows(self, labels: Tensor, values: Tensor, x: Tensor) -> None:
        """Row ``labels[t]`` of dW gets ``values[t] * x[t]``, and of db ``values[t]``. labels, values (N,), x (N, K)."""
        x = self.inputs(x)
        if self.bias is not None:
            self.bias.index_add_(0, labels, values.to(self.acc))
        if self.weight is None:
            return
        step = max(1, _ELEMENTS // x.shape[1])
        if self.accumulate:
            for r in range(0, len(x), step):
                part = slice(r, r + step)
                self.weight.index_add_(0, labels[part], (x[part] * values[part, None]).to(self.acc))
            return
        # A rounded row must be added to once, with the sum of all its tokens: group them by label.
        order = torch.argsort(labels, stable=True)
        rows, counts = torch.unique_consecutive(labels[order], return_counts=True)
        ends = counts.cumsum(0).tolist()
        first = 0
        while first < len(rows):
            start = ends[first - 1] if first else 0
            last = first + 1
            while last < len(rows) and ends[last] - start <= step:
                last += 1
            tokens, chosen = order[start : ends[last - 1]], rows[first:last]
            block = self.weight[chosen].to(self.acc)
            place = torch.repeat_interleave(torch.arange(last - first, device=x.device), counts[first:last])
            block.index_add_(0, place, (x[tokens] * values[tokens, None]).to(self.acc))
            self.weight[chosen] = block.to(self.weight.dtype)
            first = last

    def scale_(self, factor: Tensor) -> None:
        """Multiply what has been collected by a 0-dim tensor."""
        if self.weight is not None:
            self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)

    def add_scaled_(self, other: HeadGradient, factor: Tensor) -> None:
        """Add ``factor`` times another collection of the same kind."""
        for name in ("weight", "bias"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.addcmul_(its, factor)

    def zero_(self) -> None:
        for t in (self.weight, self.bias):
            if t is not None:
                t.zero_()
