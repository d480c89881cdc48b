"""Settings that hold for a block of code: memory budget, backend, precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

#: Tile budget when the user sets none. 512 MiB keeps more than 1700 rows of a 152k vocabulary in bf16.
DEFAULT_MEMORY_BUDGET = 512 << 20
PRECISIONS = ("auto", "match", "float32")
#: Names that ``settings(backend=...)`` accepts besides ``"auto"``; the registry of backends adds each.
backend_names: set[str] = set()


@dataclass(frozen=True)
class Settings:
    """See :func:`settings` for what each field means."""

    memory_budget: int = DEFAULT_MEMORY_BUDGET
    backend: str = "auto"
    precision: str = "auto"
    grad_filter: float = 0.0
    batch_invariant: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.memory_budget, bool) or not isinstance(self.memory_budget, int):
            raise TypeError(f"memory_budget must be an int (bytes), got {self.memory_budget!r}")
        if self.memory_budget <= 0:
            raise ValueError(f"memory_budget must be > 0 bytes, got {self.memory_budget}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if isinstance(self.grad_filter, bool) or not isinstance(self.grad_filter, (int, float)):
            raise TypeError(f"grad_filter must be a number, got {self.grad_filter!r}")
        if not 0 <= self.grad_filter < float("inf"):
            raise ValueError(f"grad_filter must be finite and >= 0, got {self.grad_filter}")
        if self.batch_invariant is not None and not isinstance(self.batch_invariant, bool):
            raise TypeError(f"batch_invariant must be True, False or None, got {self.batch_invariant!r}")
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a string, got {self.backend!r}")

    def updated(
        self,
        *,
        memory_budget: int | None = None,
        backend: str | None = None,
        precision: str | None = None,
        grad_filter: float | None = None,
        batch_invariant: bool | None = None,
    ) -> Settings:
        """The same with some fields replaced; ``None`` keeps a field."""
        return Settings(
            self.memory_budget if memory_budget is None else memory_budget,
            self.backend if backend is None else backend,
            self.precision if precision is None else precision,
            self.grad_filter if grad_filter is None else grad_filter,
            self.batch_invariant if batch_invariant is None else batch_invariant,
        )


class _Current(threading.local):
    """The settings of each thread. (A ContextVar would do the same, but Dynamo cannot trace one.)"""

    value = Settings()


_current = _Current()


def current_settings() -> Settings:
    """The settings in force here."""
    return _current.value


@contextmanager
def settings(
    *,
    memory_budget: int | None = None,
    backend: str | None = None,
    precision: str | None = None,
    grad_filter: float | None = None,
    batch_invariant: bool | None = None,
) -> Iterator[Settings]:
    """Set the memory budget, backend and so on for a block of code; arguments that are not given keep their value.

    Holds for this thread and for the backward pass of what is computed in the block. Each thread has its own settings.

    Args:
        memory_budget: bytes that the tiles of one call may take (default 512 MiB).
        backend: ``"auto"`` (the first backend that can serve the call; on a GPU the one with the least predicted time) or
            the name of a registered backend.
        precision: of the logits. ``"auto"`` keeps them in float32 where that is cheap (not in the ``torch`` backend on
            CPUs, whose bf16 GEMM rounds); ``"match"`` rounds them to the model's dtype, to match an inference engine;
            ``"float32"`` keeps them in float32 whatever it costs.
        grad_filter: blocks of the logits' gradient in which no entry reaches this size are left out of the GEMMs of dX and
            dW. The size is that of the loss's gradient before any loss scale. Entries of labels are never dropped. 0 (default):
            nothing is left out. Needs the ``triton`` backend. With a frozen head nothing is left out, since dX is made before
            the loss is known. ``skipped_share()`` returns the share that was left out.
        batch_invariant: whether the log-probability of a token has the same bits alone, packed, permuted and in any
            micro-batch, for the same bits of its hidden state. ``True``: backend, block sizes and GEMM shapes do not depend on
            the number of tokens or the memory budget; blocks take up to 45 MiB whatever the budget. ``False``: they are chosen
            for speed. Default: on CPUs as ``True``, but blocks stay within the budget, so bits may depend on a budget below
            64 MiB; on GPUs as ``False``. Of gradients nothing is promised.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> with settings(memory_budget=64 << 20) as s:
        ...     s.memory_budget
        67108864
    """
    before = current_settings()
    new = before.updated(
        memory_budget=memory_budget,
        backend=backend,
        precision=precision,
        grad_filter=grad_filter,
        batch_invariant=batch_invariant,
    )
    if new.backend != "auto" and new.backend not in backend_names:
        raise ValueError(f"backend must be 'auto' or one of {sorted(backend_names)}, got {new.backend!r}")
    _current.value = new
    try:
        yield new
    finally:
        _current.value = before
