"""A launch of a Triton kernel as a value, which is either run or compiled ahead of time.

Each kernel has one function that turns tensors into its launch. The backend runs that launch; ``aot/`` calls the same function
with tensors of the meta device and compiles what the launch would compile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .compat import on_device

#: Options of every launch. Triton 3.9 warns where it is left to its default, which changes in 3.10.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """What a kernel is called with.

    Attributes:
        kernel: the ``triton.jit`` function.
        arguments: run-time arguments by name: tensors (at least one), descriptors, numbers, and ``None`` for an optional
            tensor that is absent.
        constants: values of the ``tl.constexpr`` parameters by name.
        num_warps, num_stages: Triton's options; ``None`` for Triton's default.
    """

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int | None = None

    def run(self, *grid: int) -> None:
        """Launch ``grid`` programs (one to three sizes) on the GPU that holds the tensors."""
        options = {"num_warps": self.num_warps, **OPTIONS}
        if self.num_stages is not None:
            options["num_stages"] = self.num_stages
        with on_device(next(value for value in self.arguments.values() if isinstance(value, Tensor))):
            self.kernel[grid](**self.arguments, **self.constants, **options)


def unit_columns(matrix: Tensor) -> Tensor:
    """The matrix with a column stride of 1, copied where it has another."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
