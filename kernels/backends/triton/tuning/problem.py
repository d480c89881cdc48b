"""The shape for which a configuration is measured, and the key under which it is cached."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ..compat import interpreted
from ..gemm.config import GemmConfig, input_precision
from .configs import architecture_of, cache_folder, operand_bits, pick, table

#: Fewer tokens than the first share one block in any case; from the second on, more tokens only repeat the same work.
LEAST_TOKENS, MOST_TOKENS = 16, 16384
#: The files whose code decides which configuration is fastest.
SOURCES = ("gemm/kernels.py", "gemm/epilogue.py", "math.py", "gemm/combine.py", "gemm/config.py", "gemm/launch.py")


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for: the sizes that decide its speed, and nothing of what is computed."""

    device: torch.device
    dtype: torch.dtype
    num_tokens: int  # from bucket
    hidden_size: int
    vocab_size: int
    softcap: bool

    @property
    def architecture(self) -> str:
        return architecture_of(self.device)

    def starts(self) -> list[GemmConfig]:
        """The table's configuration, followed by its configurations for other numbers of tokens."""
        configs = table()[self.architecture][operand_bits(self.dtype)]
        return list(dict.fromkeys(replace(c, max_tokens=None) for c in (pick(configs, self.num_tokens), *configs)))

    def key(self) -> dict[str, Any]:
        """What must agree for a cached configuration to be used."""
        return {
            "triton": triton.__version__,
            "kernels": _sources(),
            "device": device_name(self.device),
            "architecture": self.architecture,
            "operand_bits": operand_bits(self.dtype),
            # three products of TF32 take other resources than one
            "precision": input_precision(self.dtype, self.device),
            "num_tokens": self.num_tokens,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "softcap": self.softcap,
        }

    def path(self) -> Path:
        """The file that caches its configuration."""
        key = self.key()
        folder = re.sub(r"[^\w.]+", "-", f"triton-{key['triton']}-{key['kernels']}-{key['device']}")
        name = f"{self.architecture}-{key['operand_bits']}-{key['precision']}-n{self.num_tokens}-h{self.hidden_size}"
        return cache_folder() / folder / f"{name}-v{self.vocab_size}{'-softcap' if self.softcap else ''}.json"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a configuration: of the pass over the logits without and with a gradient tile."""

    config: GemmConfig
    forward: float
    gradient: float

    @property
    def total(self) -> float:
        return self.forward + self.gradient


def bucket(num_tokens: int) -> int:
    """The number of tokens rounded up to a power of 2, within LEAST_TOKENS and MOST_TOKENS."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, triton.next_power_of_2(num_tokens)))


@functools.cache
def device_name(device: torch.device) -> str:
    """The device's name, as the cache's files and the exported table have it."""
    return "interpreter" if interpreted() else torch.get_device_module(device).get_device_name(device)


@functools.cache
def _sources() -> str:
    """A digest of the kernels' code: measurements of other code do not apply."""
    folder = Path(__file__).parents[1]
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
