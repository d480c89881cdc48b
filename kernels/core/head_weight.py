"""What the head's weight may be besides a tensor: one with LoRA adapters, or a frozen quantised one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocking import MOST_ROWS, ROW_MULTIPLE
from .quantized_weight import quantized_rows
from .weight_rows import HeadRows, JoinedRows


class _Adapter(NamedTuple):
    lora_A: Tensor  # (r, H)
    lora_B: Tensor  # (V, r)
    scaling: float
    dropout: Callable[[Tensor], Tensor] | None


def _product(x: Tensor, lora_A: Tensor) -> Tensor:
    """``x @ A.T`` (P, r); on a CPU in the row counts of batch-invariant blocks, see ``settings(batch_invariant=...)``."""
    if x.is_cuda or not len(x):
        return F.linear(x, lora_A)
    blocks = F.pad(x, (0, 0, 0, -len(x) % ROW_MULTIPLE)).split(MOST_ROWS)
    return torch.cat([F.linear(block, lora_A) for block in blocks])[: len(x)]


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
        >>> from logitless.kernels.linear_logps import linear_logps
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
                columns.append(_product(u, a.lora_A.to(wide)) * a.scaling)
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
    return quantized_rows(name, weight)
