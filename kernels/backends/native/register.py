"""Registers the backends ``cpu`` and ``cuda``."""

import functools

from ...operators.loading import why_no_cpu_extension, why_no_cuda_extension
from ..interface import Backend, Call, unsupported
from ..registry import register_backend
from ..torch import blockwise
from ..torch.predict import Traffic, predict
from . import cpu
from .passes import NATIVE_PASSES

CUDA_TRAFFIC = Traffic(8, 1, 1, 1, 1, fused_rows=True)


def why_not_cpu(call: Call) -> list[str]:
    """Every reason why ``cpu`` cannot serve a call."""
    return unsupported(call, "cpu", by_rows=True, shards=True)


def why_not_cuda(call: Call) -> list[str]:
    """Every reason why ``cuda`` cannot serve a call."""
    return unsupported(call, "cuda", by_rows=True, shards=True)


register_backend(
    Backend(
        name="cpu",
        why_not=why_not_cpu,
        why_unavailable=why_no_cpu_extension,
        score=cpu.score,
        tile_gradients=cpu.tile_gradients,
        recompute_gradients=cpu.recompute_gradients,
        elementwise=NATIVE_PASSES,
        workspace_bytes=cpu.workspace_bytes,
        score_shard=cpu.score_shard,
    )
)
# The blockwise algorithm of ``torch``, its element-wise passes by csrc/cuda.
register_backend(
    Backend(
        name="cuda",
        why_not=why_not_cuda,
        why_unavailable=why_no_cuda_extension,
        score=functools.partial(blockwise.score, passes=NATIVE_PASSES),
        tile_gradients=functools.partial(blockwise.tile_gradients, passes=NATIVE_PASSES),
        recompute_gradients=functools.partial(blockwise.recompute_gradients, passes=NATIVE_PASSES),
        elementwise=NATIVE_PASSES,
        predict=functools.partial(predict, CUDA_TRAFFIC),
        score_shard=functools.partial(blockwise.score_shard, passes=NATIVE_PASSES),
    )
)
