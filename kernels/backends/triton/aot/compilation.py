"""What it takes to compile a kernel ahead of time: how tests and budgets name the specialisations that matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel, for ``triton.compile`` without a GPU."""

    kernel: Any  # JITFunction
    name: str
    #: Argument name -> "*bf16", "i32", "fp32", "constexpr", "tensordesc<bf16[128, 64]>" ...
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    #: Hints by the argument's place: ``{(0,): [["tt.divisibility", 16]]}``.
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    #: What the kernel reads, as Triton writes it ("bf16").
    dtype: str = ""
    architectures: tuple[int, ...] = (80, 90, 100)


def aligned(
    kernel: Any,
    name: str,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 1,
    dtype: str = "",
) -> Compilation:
    """As the kernel is compiled for pointers that are aligned to 16 bytes, and integers that are multiples of 16."""
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        kind = "constexpr" if parameter.name in constants else types[parameter.name]
        signature[parameter.name] = kind
        if (kind.startswith("*") or kind in ("i32", "i64")) and not parameter.do_not_specialize:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return Compilation(kernel, name, signature, dict(constants), num_warps, num_stages, attrs, dtype)
