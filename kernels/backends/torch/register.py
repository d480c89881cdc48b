"""Registers the backend ``torch``."""

import functools

from ..interface import Backend, Call, unsupported
from ..registry import register_backend
from .blockwise import recompute_gradients, score, score_shard, tile_gradients
from .passes import TORCH_PASSES
from .predict import TORCH_TRAFFIC, predict


def why_not(call: Call) -> list[str]:
    """Every reason why it cannot serve a call."""
    return unsupported(call, by_rows=True, shards=True)


register_backend(
    Backend(
        name="torch",
        why_not=why_not,
        why_unavailable=list,
        score=score,
        tile_gradients=tile_gradients,
        recompute_gradients=recompute_gradients,
        elementwise=TORCH_PASSES,
        predict=functools.partial(predict, TORCH_TRAFFIC),
        score_shard=score_shard,
    )
)
