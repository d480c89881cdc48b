"""What a policy loss sees: tokens, their log-probabilities under the policies involved, and the totals of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from logitless.kernels.sequence_logps import segment_sum

Group = Literal["token", "sequence", "batch"]
#: What a caller may pass for a loss function besides advantages and log-probabilities of policies.
OPTIONAL_INPUTS = ("sampling_logps", "importance_sampling_ratio")
#: How the losses of tokens become one number; see :class:`logitless.FusedLinearPolicyLoss`.
AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-mean-token-sum", "fixed-length")


@dataclass
class Tokens:
    """Some scored tokens of the batch: whole sequences, all of them, or (for a token loss) any. All tensors are float64 on
    CPUs and GPUs; n tokens of s sequences.

    Attributes:
        logps: (n,) log-probabilities under the policy; carry the gradient.
        old_logps: (n,) those under the policy that sampled (or before this round of updates); equal to ``logps``, detached,
            where none were given.
        advantages: (n,).
        ref_logps: (n,) those under the reference, or ``None``.
        entropies: (n,) entropy of the policy at each token, or ``None``; carry a gradient if the loss declares it.
        inputs: what the caller passed besides: (n,) for each token, or (s,) for each sequence.
        offsets: (s + 1,) int64, where each sequence starts and ends among the n tokens; ``None`` for a token loss, whose
            sequences may be cut anywhere.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    ref_logps: Tensor | None
    entropies: Tensor | None
    inputs: Mapping[str, Tensor]
    offsets: Tensor | None

    def _offsets(self) -> Tensor:
        if self.offsets is None:
            raise ValueError("sequences may be cut anywhere in a loss of group='token': declare group='sequence'")
        return self.offsets

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each sequence, (s,)."""
        return self._offsets().diff().to(self.logps.dtype)

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence, differentiable. (n,) -> (s,)."""
        return segment_sum(values, self._offsets())

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Means over each sequence, 0 of one without tokens. (n,) -> (s,)."""
        return self.sequence_sum(values) / self.lengths.clamp(min=1)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Each sequence's value at each of its tokens. (s,) -> (n,)."""
        return torch.repeat_interleave(values, self._offsets().diff(), output_size=len(self.logps))


@dataclass
class PolicyLossResult:
    """What a policy-loss function returns when it has more to say than its losses.

    Attributes:
        losses: (n,) the loss at each token, before aggregation.
        metrics: (n,) tensors by name; detached by the engine, and averaged over the tokens of the batch.
        bonus_mask: (n,) bool, the tokens whose entropy counts for the entropy bonus; ``None``: all. What the bonus is divided
            by does not change.
    """

    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    bonus_mask: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """A policy-loss function and what the engine must know about it.

    Args:
        fn: takes :class:`Tokens`, returns one loss a token or a :class:`PolicyLossResult`. Plain differentiable torch.
        group: which tokens' coefficients depend on each other: none (``"token"``), those of a ``"sequence"``, or all
            (``"batch"``).
        needs_reference: whether the loss is undefined without reference log-probabilities.
        uses_reference: whether ``fn`` reads ``ref_logps``.
        uses_entropy: whether ``fn`` reads ``entropies``.
        entropy_gradient: whether its losses depend on ``entropies`` differentiably.
        reads: which of :data:`OPTIONAL_INPUTS` it finds in ``inputs``; others are errors.
    """

    fn: Callable[[Tokens], Tensor | PolicyLossResult]
    group: Group = "token"
    needs_reference: bool = False
    uses_reference: bool = False
    uses_entropy: bool = False
    entropy_gradient: bool = False
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be callable, got {self.fn!r}")
        if self.group not in ("token", "sequence", "batch"):
            raise ValueError(f"group must be 'token', 'sequence' or 'batch', got {self.group!r}")
        if unknown := [name for name in self.reads if name not in OPTIONAL_INPUTS]:
            raise ValueError(f"reads must be some of {OPTIONAL_INPUTS}, got {unknown[0]!r}")

    def __call__(self, tokens: Tokens) -> PolicyLossResult:
        result = self.fn(tokens)
        return result if isinstance(result, PolicyLossResult) else PolicyLossResult(result)


def token_weights(
    aggregation: str,
    sequences: Tensor,  # (N,) sequence of each token
    lengths: list[int],  # scored tokens of each sequence
    num_items: float | Tensor | None,
    max_length: int | None,
) -> Tensor:
    """What each token's loss is multiplied by in the sum that is the loss. (N,) float64."""
    wide = torch.float32 if sequences.device.type == "mps" else torch.float64
    items: float | Tensor = len(sequences) if aggregation == "token-mean" else len(lengths)
    if num_items is not None:
        items = num_items.to(sequences.device, wide) if isinstance(num_items, Tensor) else num_items
    each = torch.ones(len(sequences), dtype=wide, device=sequences.device)
    if aggregation == "sequence-mean":
        each = each / torch.tensor(lengths, dtype=wide, device=sequences.device).clamp(min=1)[sequences]
    elif aggregation == "fixed-length":
        assert max_length is not None
        each = each / max_length
    return each / (items if isinstance(items, Tensor) else max(1, items))
