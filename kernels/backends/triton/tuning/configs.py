"""Block sizes of the GEMM kernels: a table by architecture, operand size and number of tokens, in configs.json.

With ``LOGITLESS_AUTOTUNE=1`` they are measured instead, see tune.py.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..compat import interpreted

TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class GemmConfig:
    """How ``score_kernel`` and ``gradient_kernel`` divide their work.

    A token's log-probability depends, in its last bits, on BLOCK_V and PART: never choose these by what is computed (a
    policy with a tile and a reference without one must agree), only by sizes that both share.

    Attributes:
        max_tokens: the most tokens that it is for; ``None``: any number.
        BLOCK_N, BLOCK_V, BLOCK_H: tokens, vocabulary entries and hidden dimensions of a block. Powers of 2, 16 at least.
        GROUP: blocks of tokens that share weight rows in the L2 cache.
        PART, SOFTCAP_PART: columns of a block that the epilogue handles at a time, without and with a soft-cap.
        num_warps, num_stages: Triton's.
        tma: operands come by tensor descriptors, where their strides allow it.
        flatten: the next block's loads start during the epilogue.
        programs_per_sm: programs that run on a multiprocessor together.
    """

    max_tokens: int | None
    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    GROUP: int
    PART: int
    SOFTCAP_PART: int
    num_warps: int
    num_stages: int
    tma: bool
    flatten: bool
    programs_per_sm: int

    def __post_init__(self) -> None:
        for name in ("BLOCK_N", "BLOCK_V", "BLOCK_H", "PART", "SOFTCAP_PART", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2, got {value!r}")
        for name in ("BLOCK_N", "BLOCK_V", "BLOCK_H"):
            if getattr(self, name) < 16:
                raise ValueError(f"{name} must be at least 16, got {getattr(self, name)}")
        for name in ("GROUP", "num_stages", "programs_per_sm"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    def for_unaligned(self) -> GemmConfig:
        """For operands of which Triton does not know that rows are aligned: each element is loaded by itself.

        Every load then has an address of its own in registers, of which a block of 16 hidden dimensions, the least that
        tensor cores take, leaves enough. BLOCK_V and PART stay, and with them a token's log-probability.
        """
        return replace(self, BLOCK_H=16, tma=False)


def config_of(row: dict[str, Any]) -> GemmConfig:
    """The configuration of a JSON object.

    Raises:
        ValueError: when a field is missing, unknown or out of range.
    """
    known = {f.name for f in fields(GemmConfig)}
    if set(row) != known:
        raise ValueError(f"a configuration must have the fields {sorted(known)}, got {sorted(row)}")
    try:
        return GemmConfig(**row)
    except TypeError as error:
        raise ValueError(str(error)) from error


@functools.cache
def table() -> dict[str, dict[str, list[GemmConfig]]]:
    """Configurations by architecture and operand size in bits; of each list the first that is for the tokens is meant.

    Raises:
        ValueError: naming the entry, when configs.json has a wrong one.
    """
    return parse(json.loads(TABLE.read_text()))


def parse(entries: dict[str, Any]) -> dict[str, dict[str, list[GemmConfig]]]:
    """The table of a JSON object; see :func:`table`."""
    found: dict[str, dict[str, list[GemmConfig]]] = {}
    for architecture, entry in entries.items():
        for size in ("16", "32"):
            where = f"{architecture}.{size}"
            rows = entry.get(size)
            if not rows:
                raise ValueError(f"{where} has no configuration")
            try:
                configs = [config_of(row) for row in rows]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if configs[-1].max_tokens is not None:
                raise ValueError(f"{where} must end with a configuration for any number of tokens (max_tokens null)")
            found.setdefault(architecture, {})[size] = configs
    return found


def dumps(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A table as text, with a line for each configuration."""

    def value(v: str | list[dict[str, Any]]) -> str:
        if isinstance(v, str):
            return json.dumps(v)
        return "[\n" + ",\n".join(f"      {json.dumps(row)}" for row in v) + "\n    ]"

    def entry(e: Mapping[str, Any]) -> str:
        return "{\n" + ",\n".join(f"    {json.dumps(k)}: {value(v)}" for k, v in e.items()) + "\n  }"

    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {entry(v)}" for k, v in entries.items()) + "\n}\n"


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The table's name for a device."""
    if interpreted():
        return "interpreter"
    if device.type != "cuda" or torch.version.hip is not None:
        return "default"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12.x) has neither wgmma nor tcgen05
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80" if major >= 8 else "default")


def pick(configs: Sequence[GemmConfig], num_tokens: int) -> GemmConfig:
    """The first configuration that is for so many tokens."""
    return next(c for c in configs if c.max_tokens is None or num_tokens <= c.max_tokens)


def autotuning() -> bool:
    """Whether configurations are measured (``LOGITLESS_AUTOTUNE=1``) instead of looked up."""
    value = os.environ.get("LOGITLESS_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"LOGITLESS_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


def cache_folder() -> Path:
    """Where measured configurations are kept: ``LOGITLESS_CACHE_DIR``, or ``logitless`` in the user's folder for caches."""
    if folder := os.environ.get("LOGITLESS_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitless"


def gemm_config(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, vocab_size: int, softcap: bool
) -> GemmConfig:
    """What the kernels use for hidden states of that dtype and shape. Times nothing unless :func:`autotuning`."""
    if autotuning():
        from .tune import tuned_config  # it launches kernels, which need this module

        return tuned_config(device, dtype, num_tokens, hidden_size, vocab_size, softcap)
    return pick(table()[architecture_of(device)][operand_bits(dtype)], num_tokens)


def operand_bits(dtype: torch.dtype) -> str:
    """The table's name for a dtype."""
    return str(8 * dtype.itemsize)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 in the interpreter, which runs one program after the other."""
    if interpreted():
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
