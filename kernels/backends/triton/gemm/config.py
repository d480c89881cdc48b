"""Block sizes and options of the GEMM kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GemmConfig:
    """How ``score_kernel`` and ``recompute_kernel`` divide their work.

    The last bits of a token's log-probability depend on BLOCK_V and PART. Choose these by sizes that a policy and its
    reference share, never by what is computed: a policy with a tile and a reference without one must agree.

    Attributes:
        max_tokens: the most tokens that it serves; ``None`` for any number.
        BLOCK_N, BLOCK_V, BLOCK_H: tokens, vocabulary entries and hidden dimensions of a block. Powers of 2, at least 16.
        GROUP: blocks of tokens that share weight rows in the L2 cache.
        PART, SOFTCAP_PART: columns of a block that the epilogue handles at a time, without and with a soft-cap.
        num_warps, num_stages: Triton's options.
        tma: load operands by tensor descriptors where their strides allow it.
        flatten: start the next block's loads during the epilogue.
        programs_per_sm: programs that run on a multiprocessor at the same time.
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
        """The configuration for operands whose rows may be unaligned, where each element is loaded separately.

        Every such load keeps an address in registers. A block of 16 hidden dimensions, the smallest that tensor cores take,
        leaves enough of them. BLOCK_V and PART stay, so log-probabilities keep their bits.
        """
        return replace(self, BLOCK_H=16, tma=False)


def input_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Precision of ``tl.dot``: float32 operands keep theirs, in three products of TF32, unless torch may round them to TF32.

    The meta device stands for an NVIDIA GPU.
    """
    if dtype != torch.float32 or device.type not in ("cuda", "meta") or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
