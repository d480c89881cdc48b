"""What the engine is asked to do, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.stats import RowStats
from logitless.kernels.planner.plan import Plan, Step

from .preference.loss import Loss, LossResult, Margin
from .scored_tokens import Entries


@dataclass(frozen=True)
class Term:
    """One objective over some of the batch's sequences.

    Attributes:
        loss: the loss.
        sequences: which sequences; for pair losses the chosen ones, then the rejected ones.
        weight: factor of this term in the sum.
        inputs: tensors with one value a sequence of this term, or one for all; ``ref_logps`` among the former.
    """

    loss: Loss
    sequences: tuple[int, ...]
    weight: float = 1.0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> list[list[int]]:
        s = self.sequences
        if self.loss.group == "sequence":
            return [[i] for i in s]
        half = len(s) // 2
        pairs = [[s[i], s[half + i]] for i in range(half)]
        return pairs if self.loss.group == "pair" else [[i for pair in pairs for i in pair]]

    @property
    def nll_sequences(self) -> tuple[int, ...]:
        """The sequences whose tokens the NLL term is over: the chosen ones, or all of a sequence loss."""
        return self.sequences if self.loss.group == "sequence" else self.sequences[: self.num_units]

    @property
    def num_units(self) -> int:
        """What the loss averages over: sequences, or pairs."""
        return len(self.sequences) if self.loss.group == "sequence" else len(self.sequences) // 2


@dataclass
class Reference:
    """Hidden states and head of the reference model, scored forward-only in the same tiles. hidden (P, H')."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Coefficients(NamedTuple):
    """What the gradient of a step's tokens is made from, each (n,); both ``None`` where none is wanted."""

    logps: Tensor | None  # dLoss / dlogps
    entropy: Tensor | None = None  # dLoss / dentropy


class Evaluates(Protocol):
    """Evaluates a loss step by step, and keeps the results."""

    loss: Tensor  # 0-dim, of the steps so far

    def coefficients(
        self, step: Step, stats: RowStats, ref_token_logps: Tensor | None, needs_grad: bool
    ) -> Coefficients: ...  # adds the step's share to the loss

    def report(self, plan: Plan, tokens: dict[str, Tensor], dtype: torch.dtype) -> Any: ...  # tokens: (N,) each, for metrics


@dataclass
class Job(ABC):
    """All of a call but the differentiable tensors, as the engine sees it.

    Attributes:
        entries: the scored tokens.
        head: the head's transforms, of the reference too.
        reference: scored in the same tiles; ``None``: not here.
        outputs: token statistics for metrics.
    """

    entries: Entries
    head: HeadSpec
    reference: Reference | None
    outputs: frozenset[str]

    margin: ClassVar[Margin | None] = None  # as in Loss
    loss_outputs: ClassVar[frozenset[str]] = frozenset()  # token statistics that the loss itself needs
    token_groups: ClassVar[bool] = False  # every token is a group of its own
    entropy_gradient: ClassVar[bool] = False  # the loss depends on the tokens' entropy too

    @abstractmethod
    def evaluation(self, wide: torch.dtype, device: torch.device) -> Evaluates:
        """What evaluates the loss, in that dtype."""


@dataclass
class Report:
    """What came of a call besides the loss; detached. S sequences, N tokens in the order of the entries."""

    plan: Plan
    logps: Tensor  # (S,)
    lengths: Tensor  # (S,)
    ref_logps: Tensor | None  # (S,), where the reference was scored here
    results: list[LossResult]  # one a term, in the order of its groups
    tokens: dict[str, Tensor]  # (N,) each
