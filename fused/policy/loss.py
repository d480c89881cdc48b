"""What a policy-loss function receives and returns: tokens with their log-probabilities, and one loss for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from logitless.kernels.tile.segments import segment_sum

from ..sequence_group import WholeSequences, whole_sums

Group = Literal["token", "sequence", "batch"]
#: Optional arguments of a call that a loss function may read.
OPTIONAL_INPUTS = ("sampling_logps", "importance_sampling_ratio")


@dataclass
class Tokens:
    """Some scored tokens of the batch: whole sequences or, for a token loss, any. n tokens of s sequences; all tensors are
    float64 on CPUs and GPUs.

    Attributes:
        logps: (n,) log-probabilities under the policy; carry the gradient.
        old_logps: (n,) those under the policy that sampled (or before this round of updates); ``logps``, detached, if none
            were given.
        advantages: (n,).
        ref_logps: (n,) those under the reference, or ``None``.
        entropies: (n,) entropy of the policy at each token, or ``None``; carry a gradient if the loss declares it.
        inputs: further arguments by name, (n,) per token or (s,) per sequence.
        offsets: (s + 1,) int64, where each sequence starts and ends among the n tokens; ``None`` for a token loss, whose
            sequences may be divided anywhere, and with a ``sequence_group``, whose other ranks have tokens of the sequences:
            ``lengths``, ``sequence_sum``, ``sequence_mean`` and ``to_tokens`` are those of whole sequences.
        add: a backend's ``segment_sum``.
        whole: the sequences, where several ranks share them.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    ref_logps: Tensor | None
    entropies: Tensor | None
    inputs: Mapping[str, Tensor]
    offsets: Tensor | None
    add: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    whole: WholeSequences | None = field(default=None, repr=False)

    def _offsets(self) -> Tensor:
        if self.whole is not None:
            return self.whole.offsets
        if self.offsets is None:
            raise ValueError("a loss of group='token' does not get whole sequences: declare group='sequence'")
        return self.offsets

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each sequence, (s,)."""
        return self._offsets().diff().to(self.logps.dtype) if self.whole is None else self.whole.lengths

    def sequence_sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence, differentiable. (n,) -> (s,)."""
        sums = segment_sum(values, self._offsets(), self.add)
        return sums if self.whole is None else whole_sums(sums, self.whole.group, partial_loss=True)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """Means over each sequence, 0 of one without tokens. (n,) -> (s,)."""
        return self.sequence_sum(values) / self.lengths.clamp(min=1)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Each sequence's value at each of its tokens. (s,) -> (n,)."""
        return torch.repeat_interleave(values, self._offsets().diff(), output_size=len(self.logps))


@dataclass
class PolicyLossResult:
    """What a policy-loss function returns if it has metrics or a bonus mask besides its losses.

    Attributes:
        losses: (n,) the loss at each token, before aggregation.
        metrics: (n,) tensors by name; detached by the engine, and averaged over the tokens of the batch. The names must not
            depend on the data.
        bonus_mask: (n,) bool, the tokens whose entropy counts for the entropy bonus; ``None``: all. The bonus is divided by
            the same number as without a mask.
    """

    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    bonus_mask: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """A loss function and its properties that the engine depends on.

    Args:
        fn: takes :class:`Tokens`, returns one loss per token or a :class:`PolicyLossResult`. Plain differentiable torch. It is
            called with no tokens if none is scored.
        group: which tokens' coefficients depend on each other: none (``"token"``), those of a ``"sequence"``, or all
            (``"batch"``).
        needs_reference: whether the loss is undefined without reference log-probabilities.
        uses_reference: whether ``fn`` reads ``ref_logps``.
        uses_entropy: whether ``fn`` reads ``entropies``.
        entropy_gradient: whether its losses depend on ``entropies`` differentiably.
        reads: which of :data:`OPTIONAL_INPUTS` ``fn`` reads from ``inputs``; passing others is an error.
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
