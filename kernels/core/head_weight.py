"""Weights of a head that are read a few rows at a time: quantised ones, and ones with a LoRA adapter.

A backend reads a weight by ``weight_block`` (rows ``v0:v1``) and ``index_select`` (the labels' rows) alone, so only one block
of it exists in floating point at a time.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


class _Adapter(NamedTuple):
    lora_A: Tensor  # (r, H)
    lora_B: Tensor  # (V, r)
    scaling: float
    dropout: Callable[[Tensor], Tensor] | None


class LoRAWeight:
    """The weight of a head with a LoRA adapter, ``W + scaling * B @ A``, for ``weight=`` of every function and loss module.

    The sum is never formed. The logits are ``[h, u] @ [W, B].T`` with ``u = scaling * dropout(h) @ A.T``, in one product per
    block of the vocabulary, so a step costs ``(4 + 6 r / H) N H V`` FLOP in a loss module and ``(6 + 8 r / H) N H V`` in
    :func:`logitless.linear_logps`. Gradients reach the hidden states, A and B; the base is frozen. ``u`` is computed in the
    wider of the dtypes of ``h`` and A, whatever autocast is in force. In 16-bit hidden states, ``u`` and B are rounded to
    that dtype once, for the product; B's gradient is added up in float32.

    Args:
        base: (V, H) frozen weight W: a tensor, a quantised weight, or another ``LoRAWeight`` (several active adapters).
        lora_A: (r, H).
        lora_B: (V, r).
        scaling: factor of the adapter's product: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
        dropout: applied to the adapter's input, such as a ``torch.nn.Dropout``; ``None``: none.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> from logitless import linear_logps
        >>> base, lora_A, lora_B = torch.randn(100, 16), torch.randn(4, 16), torch.zeros(100, 4, requires_grad=True)
        >>> weight = LoRAWeight(base, lora_A, lora_B, scaling=2.0)
        >>> linear_logps(torch.randn(2, 5, 16), weight, torch.randint(100, (2, 5))).logps.requires_grad
        True
    """

    def __init__(
        self,
        base: Tensor | HeadRows | LoRAWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float = 1.0,
        dropout: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        adapters: tuple[_Adapter, ...] = base.adapters if isinstance(base, LoRAWeight) else ()
        base = base.base if isinstance(base, LoRAWeight) else read_weight("base", base)
        if not isinstance(base, (Tensor, HeadRows)) or base.dim() != 2:
            given = tuple(base.shape) if isinstance(base, Tensor) else type(base).__name__
            raise TypeError(f"base must be a weight of shape [vocab, hidden], got {given}")
        if base.requires_grad:
            raise ValueError("base requires a gradient, but the weight under a LoRA adapter is frozen: detach it")
        vocab, hidden = base.shape
        for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
            if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
                what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating point matrix, got {what}")
            if value.device != base.device:
                raise ValueError(f"{name} is on {value.device} but base is on {base.device}: move one of them")
        if lora_A.shape[1] != hidden or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A must have shape [r, {hidden}], got {tuple(lora_A.shape)}")
        if tuple(lora_B.shape) != (vocab, lora_A.shape[0]):
            raise ValueError(f"lora_B must have shape [{vocab}, {lora_A.shape[0]}], got {tuple(lora_B.shape)}")
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            raise TypeError(f"scaling must be a finite number, got {scaling!r}")
        if dropout is not None and not callable(dropout):
            raise TypeError(f"dropout must be a function of the adapter's input, or None, got {dropout!r}")
        self.base: Tensor | HeadRows = base
        self.adapters: tuple[_Adapter, ...] = (*adapters, _Adapter(lora_A, lora_B, float(scaling), dropout))

    @property
    def shape(self) -> torch.Size:
        """(V, H)."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def rank(self) -> int:
        """r, of all adapters together."""
        return sum(a.lora_A.shape[0] for a in self.adapters)

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for a in self.adapters for t in (a.lora_A, a.lora_B))

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return 2

    def __getitem__(self, rows: slice) -> LoRAWeight:
        """The first ``rows.stop`` rows."""
        weight: Any = self.base[rows]
        for a in self.adapters:
            weight = LoRAWeight(weight, a.lora_A, a.lora_B[rows], a.scaling, a.dropout)
        return weight

    def detach(self) -> LoRAWeight:
        """The same without gradients."""
        weight: Any = self.base
        for a in self.adapters:
            weight = LoRAWeight(weight, a.lora_A.detach(), a.lora_B.detach(), a.scaling, a.dropout)
        return weight

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors by name."""
        if isinstance(self.base, Tensor):
            yield "base", self.base
        for a in self.adapters:
            yield "lora_A", a.lora_A
            yield "lora_B", a.lora_B

    def join(
        self,
        hidden: Tensor,  # (P, H)
        scored: Tensor,  # (P,) bool
    ) -> JoinedRows:
        """``[W, B]`` and ``u``, which is differentiable in h and A, and 0 where nothing is scored."""
        columns: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.masked_fill(~scored[:, None], 0)  # NaN there must not reach the gradient of A
            for a in self.adapters:
                wide = torch.promote_types(hidden.dtype, a.lora_A.dtype)
                u = x.to(wide) if a.dropout is None else a.dropout(x.to(wide))
                columns.append(F.linear(u, a.lora_A.to(wide)) * a.scaling)
            trained = self.adapters[0].lora_B
            if len(self.adapters) > 1:
                trained = torch.cat([a.lora_B for a in self.adapters], dim=1)
        inputs = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return JoinedRows(self.base, trained, inputs)


#: What ``weight=`` of the public functions may be, after ``read_weight``.
Weight = Tensor | HeadRows | LoRAWeight


def read_weight(name: str, weight: Any) -> Any:
    """A quantised weight as :class:`HeadRows`; anything else as it is.

    Raises:
        TypeError, ValueError: for a quantised weight that cannot be read or requires a gradient.
    """
    if not isinstance(weight, Tensor) or type(weight) in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return weight
    from .quantized_weight import quantized_rows

    return quantized_rows(name, weight)


def join(
    hidden: Tensor,  # (P, H)
    weight: Weight,
    scored: Tensor,  # (P,) bool
) -> Tensor | HeadRows:
    """The weight as backends take it: one with an adapter as :class:`JoinedRows`."""
    return weight.join(hidden, scored) if isinstance(weight, LoRAWeight) else weight


def trained_part(weight: Tensor | HeadRows) -> Tensor | None:
    """The tensor that a weight's gradient is of."""
    return weight.trained if isinstance(weight, HeadRows) else weight
