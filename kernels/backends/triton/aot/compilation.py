"""One specialisation of a kernel, derived from a launch in the way that Triton derives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..gemm.config import GemmConfig
from ..launch import Launch

#: Triton's names of types.
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
#: Triton's default for NVIDIA GPUs.
DEFAULT_STAGES = 3
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compilation:
    """What ``triton.compile`` needs for one specialisation of a kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        name: kernel, variant, types and block sizes; unique together with the architecture.
        signature: by argument, ``"*bf16"``, ``"i32"``, ``"fp32"``, ``"constexpr"``, ``"tensordesc<bf16[128, 64]>"`` ...
        constexprs: values of the constants, among them absent tensors (``None``) and integers that are 1.
        num_warps, num_stages: Triton's options.
        attrs: hints by the argument's place: ``{(0,): [["tt.divisibility", 16]]}``.
        dtype: what the kernel reads, as Triton writes it ("bf16").
        architectures: for which it is compiled.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    dtype: str = ""
    architectures: tuple[int, ...] = (80, 90, 100)


@dataclass(frozen=True)
class GemmCompilation(Compilation):
    """A specialisation of a kernel that has a configuration."""

    config: GemmConfig | None = None


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and hints of a launch, as ``JITFunction`` derives them from its arguments.

    An integer that is 1 and an absent tensor are constants; pointers and integers that are multiples of 16 get a hint, except
    where the kernel says ``do_not_specialize``.
    """
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.constants[name] if parameter.is_constexpr else launch.arguments[name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value, parameter)
        signature[name] = kind
        if kind == "constexpr":
            constexprs[name] = value
        elif not parameter.do_not_specialize and _is_divisible(value):
            attrs[i,] = _DIVISIBLE
    return signature, constexprs, attrs


def _kind(value: Any, parameter: Any) -> str:
    if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return parameter.annotation_type or "fp32"
    return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"


def _is_divisible(value: Any) -> bool:
    """Whether Triton assumes a multiple of 16: of bytes for a pointer, of anything for an integer."""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compilation(name: str, launch: Launch, dtype: torch.dtype) -> Compilation:
    """The compilation of a launch for all architectures; ``dtype``: what the kernel reads."""
    signature, constexprs, attrs = specialised(launch)
    stages = DEFAULT_STAGES if launch.num_stages is None else launch.num_stages
    return Compilation(launch.kernel, name, signature, constexprs, launch.num_warps, stages, attrs, NAMES[dtype])


def gemm_compilation(
    name: str, launch: Launch, dtype: torch.dtype, architecture: int, config: GemmConfig | None = None
) -> Compilation:
    """The compilation of a launch for one architecture, with the configuration if the kernel has one."""
    made = {**vars(compilation(name, launch, dtype)), "architectures": (architecture,)}
    return Compilation(**made) if config is None else GemmCompilation(**made, config=config)
