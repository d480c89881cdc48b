"""Per-token results of the log-prob core, and the options of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Outputs of the core besides ``logps``; each is computed only when asked for.
OPTIONAL_OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
OUTPUTS = ("logps", *OPTIONAL_OUTPUTS)


class TokenStats(NamedTuple):
    """Per-token results of :func:`logitless.linear_logps`, each shaped like ``labels``; ``None`` unless asked for.

    Every field is 0 (``False``) where the label is ``ignore_index``. ``logps`` and ``entropy`` are differentiable.

    Attributes:
        logps: log-probability of the label, float32 (float64 for float64 inputs), never above 0.
        entropy: entropy of the next-token distribution, nats.
        mean_logits: mean over the vocabulary of the transformed logits.
        is_top1: whether no other entry beats the label; the first index wins a tie, as in ``argmax``. Bool.
        log_sum_sq_probs: ``log(sum_v p_v ** 2)``.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


@dataclass(frozen=True)
class CoreOptions:
    """The arguments of a backend that are not tensors."""

    outputs: frozenset[str] = frozenset()  # of OPTIONAL_OUTPUTS
    precision: str = "auto"
    workspace: int = 32 << 20  # bytes for blocks of logits
    #: Elements of the float32 block that the element-wise pass works in on a CPU. On 2 cores (bf16, H=1024, V=65536, 768
    #: tokens, DPO) a step takes the same 0.88 s with 2^18 to 2^21; larger blocks mean fewer waits where cores are shared.
    cache_elements: int = 1 << 20

    #: A block of the gradient in which no entry reaches this is left out of the GEMMs of dX and dW. 0: none.
    grad_filter: float = 0.0
    #: Whether nothing that affects the bits of log-probabilities depends on the number of tokens.
    batch_invariant: bool = False
    #: A tile of ``score`` holds ``exp(z - k)`` without a soft-cap's slope: the gradient of the entropy is made from it.
    slopes_later: bool = False

    def without_outputs(self) -> CoreOptions:
        """The same, for a pass that needs logps alone."""
        return replace(self, outputs=frozenset())


@dataclass
class RowStats:
    """Results of one pass over the logits of N tokens, relative to the offset ``k`` of each.

    ``sum_others = sum(exp(z_v - k) for v != label)`` and ``log_denom = log(sum_others + exp(z_label - k))``.
    """

    logps: Tensor  # (N,)
    k: Tensor  # (N,) the target logit, or the row maximum where the target logit is far below it
    sum_others: Tensor  # (N,) R
    log_denom: Tensor  # (N,) log D
    target_offset: Tensor  # (N,) z_label - k, 0 unless k was raised
    target_slope: Tensor | None = None  # (N,) 1 - tanh^2 at the target; None without soft-cap
    entropy: Tensor | None = None  # (N,)
    mean_logits: Tensor | None = None  # (N,)
    is_top1: Tensor | None = None  # (N,) bool
    log_sum_sq_probs: Tensor | None = None  # (N,)
    unit_dhidden: Tensor | None = None  # (N, H) d logps / d hidden, when asked for
    #: (N,) offset of this rank's part of the vocabulary, which its tile is relative to; None: the head is not sharded.
    shard_k: Tensor | None = None
    block_max: Tensor | None = None  # (N, blocks) bounds of |G| in the tile's blocks, for grad_filter

    @classmethod
    def cat(cls, parts: Sequence[RowStats]) -> RowStats:
        """Join the results of consecutive tokens."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(p, f.name) for p in parts]
            joined[f.name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)
