"""The interface between the engine and the two families of losses: what a job provides, and what evaluates its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from logitless.kernels.backends.interface import ElementWise
from logitless.kernels.core.stats import RowStats
from logitless.kernels.planner.plan import Plan
from logitless.kernels.planner.steps import Step

from .call import LossCall
from .scored_tokens import ScoredTokens

Report = TypeVar("Report")
Report_co = TypeVar("Report_co", covariant=True)


class Coefficients(NamedTuple):
    """Derivatives of the loss for the tokens of a step, (n,) each; ``None`` where no gradient is needed."""

    logps: Tensor | None  # dLoss / dlogps
    entropy: Tensor | None = None  # dLoss / dentropy


class Evaluation(Protocol[Report_co]):
    """Evaluates a loss step by step and keeps the results.

    Attributes:
        loss: 0-dim, the sum over the steps so far.
    """

    loss: Tensor

    def coefficients(self, step: Step, stats: RowStats, ref_logps: Tensor | None, needs_grad: bool) -> Coefficients:
        """Add the step's share to the loss. ``ref_logps`` (n,): of the reference's tokens, where its states were scored."""
        ...

    def report(self, plan: Plan, stats: dict[str, Tensor], dtype: torch.dtype) -> Report_co:
        """Everything besides the loss. ``stats``: the job's ``outputs`` by name, (N,) each."""
        ...


@dataclass(frozen=True)
class Job(ABC, Generic[Report]):
    """One call of a loss module as the engine sees it.

    Attributes:
        call: the checked arguments.
        outputs: token statistics that the metrics need.
    """

    call: LossCall
    outputs: frozenset[str]

    margin: ClassVar[str | None] = None  # as in PreferenceLoss
    loss_outputs: ClassVar[frozenset[str]] = frozenset()  # token statistics that the loss needs
    token_groups: ClassVar[bool] = False  # every token is a group of its own
    entropy_gradient: ClassVar[bool] = False  # the loss depends on the tokens' entropy

    @abstractmethod
    def scored_tokens(self) -> ScoredTokens:
        """The tokens that the engine scores."""

    @abstractmethod
    def evaluation(self, tokens: ScoredTokens, elementwise: ElementWise) -> Evaluation[Report]:
        """What evaluates the loss on these tokens, with the element-wise functions of the chosen backend."""
