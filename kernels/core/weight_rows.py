"""Weights of a head that are no tensors: they are read a few rows at a time.

A backend reads a weight by ``weight_block`` (rows ``v0:v1``) and ``index_select`` (the labels' rows) alone, so only one block
of it exists in floating point at a time.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

#: Elements that are converted at a time within a block.
_ELEMENTS = 1 << 17
_GPU_ELEMENTS = 1 << 24


class HeadRows(ABC):
    """A weight (V, K) that is read by rows. Backends write no gradient for it, except for ``trained``.

    The last block read is kept until :meth:`release`: the algorithms read each block up to three times in a row.

    Attributes:
        shape: (V, K).
        dtype: of the numbers that it stands for.
        device: where its data is.
        trained: (V, r), its last r columns, if these may need a gradient; else ``None``.
        sources: frozen tensors that it is read from, which must not change before the backward pass.
        input_rounding: relative rounding of the hidden states in the layer's own forward pass, which is not done here.
    """

    input_rounding = 0.0
    trained: Tensor | None = None
    sources: tuple[Tensor, ...] = ()

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self._block: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    @abstractmethod
    def write(self, v0: int, v1: int, out: Tensor) -> None:
        """Write rows ``v0:v1`` to ``out`` (v1 - v0, K), rounded to its dtype."""

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """The given rows (n,) of the weight, (n, K)."""

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return 2

    def __getitem__(self, rows: slice) -> HeadRows:
        """The first ``rows.stop`` rows."""
        assert rows.start is None and rows.step is None and rows.stop <= len(self)
        first = copy.copy(self)
        first.shape, first._block = torch.Size((rows.stop, self.shape[1])), None
        return first

    @property
    def requires_grad(self) -> bool:
        return self.trained is not None and self.trained.requires_grad

    def detach(self) -> HeadRows:
        return self

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        assert dim == 0
        return self.take(index)

    def block(self, v0: int, v1: int, dtype: torch.dtype) -> Tensor:
        """Rows ``v0:v1`` (v1 - v0, K) in ``dtype``; valid until the next block is read."""
        key = v0, v1, dtype
        if self._block is None or self._block[0] != key:
            self.release()
            out = torch.empty((v1 - v0, self.shape[1]), dtype=dtype, device=self.device)
            step = max(1, (_GPU_ELEMENTS if out.is_cuda else _ELEMENTS) // self.shape[1])
            for r in range(v0, v1, step):
                end = min(r + step, v1)
                self.write(r, end, out[r - v0 : end - v0])
            self._block = key, out
        return self._block[1]

    def release(self) -> None:
        """Free the block that was read last."""
        self._block = None


class JoinedRows(HeadRows):
    """``[W, B]``: a frozen weight W (V, H) and trained columns B (V, r).

    Attributes:
        inputs: (P, r), ``u``: what B is multiplied by, for each row of the hidden states. Differentiable.
    """

    def __init__(self, base: Tensor | HeadRows, trained: Tensor, inputs: Tensor) -> None:
        shape = base.shape[0], base.shape[1] + trained.shape[1]
        super().__init__(shape, torch.promote_types(base.dtype, trained.dtype), base.device)
        self.base, self.trained, self.inputs = base, trained, inputs
        self.sources = base.sources if isinstance(base, HeadRows) else (base,)

    def write(self, v0: int, v1: int, out: Tensor) -> None:
        hidden = self.base.shape[1]
        assert self.trained is not None
        if isinstance(self.base, HeadRows):
            self.base.write(v0, v1, out[:, :hidden])
        else:
            out[:, :hidden].copy_(self.base[v0:v1])
        out[:, hidden:].copy_(self.trained[v0:v1])

    @staticmethod
    def extend(hidden: Tensor, inputs: Tensor) -> Tensor:
        """``[h, u]`` (n, H + r) in the dtype of h (n, H), which :meth:`block` is multiplied by."""
        return torch.cat((hidden, inputs.to(hidden.dtype)), dim=1)

    def take(self, rows: Tensor) -> Tensor:
        assert self.trained is not None
        parts = (self.base.index_select(0, rows), self.trained.index_select(0, rows))
        return torch.cat([part.to(self.dtype) for part in parts], dim=1)


def trained_part(weight: Tensor | HeadRows) -> Tensor | None:
    """The tensor that a weight's gradient is of."""
    return weight.trained if isinstance(weight, HeadRows) else weight
