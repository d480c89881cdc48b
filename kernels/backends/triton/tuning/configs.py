"""The table of configurations of the GEMM kernels, by architecture, operand size and number of tokens: ``configs.json``.

Also the two settings of its alternative, measured configurations: ``LOGITLESS_AUTOTUNE`` and ``LOGITLESS_CACHE_DIR``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..compat import interpreted
from ..gemm.config import GemmConfig

TABLE = Path(__file__).with_name("configs.json")


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
    """Configurations by architecture and operand size in bits, in lists from which :func:`pick` takes one.

    Raises:
        ValueError: naming the entry of configs.json that is wrong.
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
    """The first configuration that serves so many tokens."""
    return next(c for c in configs if c.max_tokens is None or num_tokens <= c.max_tokens)


def autotuning() -> bool:
    """Whether configurations are measured (``LOGITLESS_AUTOTUNE=1``) instead of looked up."""
    value = os.environ.get("LOGITLESS_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"LOGITLESS_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


def cache_folder() -> Path:
    """The folder of measured configurations: ``LOGITLESS_CACHE_DIR``, or ``logitless`` in the user's cache folder."""
    if folder := os.environ.get("LOGITLESS_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitless"


def operand_bits(dtype: torch.dtype) -> str:
    """The table's name for a dtype."""
    return str(8 * dtype.itemsize)
