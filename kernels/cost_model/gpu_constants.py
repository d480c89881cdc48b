"""The constants of GPUs for the cost model: ``gpu_constants.json``, checked and looked up.

A measurement replaces an entry: the numbers, ``device``, ``source`` (how they were measured, with the shapes), ``measured``
true, the ``date`` and the ``torch_version``.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

_FILE = "gpu_constants.json"
#: Per SM and clock, on all architectures so far.
_EXPONENTIALS = 16


@dataclass(frozen=True)
class Gpu:
    """Constants of one architecture, and where they come from."""

    architecture: str
    device: str
    source: str
    measured: bool
    date: str | None
    torch_version: str | None
    bandwidth: float  # of a copy, bytes read and written per second
    bf16_flops: float  # per second, of a large GEMM by cuBLAS; float16 alike
    fp32_flops: float  # without TF32, as torch has it by default
    fp64_flops: float
    triton_gemm: float  # speed of our Triton kernels' GEMM without its epilogue, relative to cuBLAS
    sm_count: int
    clock_hz: float  # under load
    l2_bytes: int
    launch_seconds: float  # of a short kernel in a full queue

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP per second of cuBLAS."""
        return {torch.float32: self.fp32_flops, torch.float64: self.fp64_flops}.get(dtype, self.bf16_flops)

    @property
    def exponentials(self) -> float:
        """Per second."""
        return _EXPONENTIALS * self.sm_count * self.clock_hz


def load_constants(text: str) -> dict[str, Gpu]:
    """The entries of a file of constants, by architecture.

    Raises:
        ValueError: naming the entry and the field that is missing, unknown or not what it should be.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_FILE} is not JSON: {error}") from None
    if not isinstance(entries, dict) or "default" not in entries:
        raise ValueError(f"{_FILE} must be an object with an entry 'default'")
    return {name: _checked(name, entry) for name, entry in entries.items()}


def _checked(name: str, entry: Any) -> Gpu:
    kinds = {f.name: str(f.type) for f in fields(Gpu) if f.name != "architecture"}
    if not isinstance(entry, dict):
        raise ValueError(f"{_FILE}: {name} must be an object, got {entry!r}")
    for key in (*kinds, *entry):
        if key not in kinds or key not in entry:
            problem = "missing" if key in kinds else "unknown"
            raise ValueError(f"{_FILE}: {name}.{key} is {problem}; the fields are {', '.join(kinds)}")
    for key, kind in kinds.items():  # ``measured`` comes before those that depend on it
        if (wanted := _expected(entry[key], kind, entry["measured"])) is not None:
            raise ValueError(f"{_FILE}: {name}.{key} must be {wanted}, got {entry[key]!r}")
    return Gpu(architecture=name, **entry)


def _expected(value: Any, kind: str, measured: bool) -> str | None:
    """What the value should be; ``None`` if it is."""
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind in ("int", "float"):
        types = int if kind == "int" else (int, float)
        if isinstance(value, types) and not isinstance(value, bool) and 0 < value < math.inf:
            return None
        return "a positive integer" if kind == "int" else "a positive number"
    if (isinstance(value, str) and value) or (value is None and kind != "str" and not measured):
        return None
    return "text" if kind == "str" else "text where measured is true" if measured else "text or null"


@functools.cache
def constants() -> dict[str, Gpu]:
    """The constants that the package brings, by architecture: ``"sm_90"``, ..., ``"default"``."""
    return load_constants(Path(__file__).with_name(_FILE).read_text(encoding="utf-8"))


def gpu_of(device: torch.device, architecture: str | None = None) -> Gpu:
    """The constants of an architecture, by default that of the device; those called ``default`` where it has none."""
    if architecture is None and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        architecture = f"sm_{major}{minor}"
    return constants().get(architecture or "default", constants()["default"])
