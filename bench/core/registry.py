"""The registry of providers: what can be benchmarked, on which tasks, and every reason why a provider cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .inputs import Inputs


@dataclass
class Result:
    """What one timed step computed; ``None`` where the provider does not expose it.

    Attributes:
        loss: 0-dim.
        token_logps: (S, T) or, of packed tokens, (P,); ignored positions are not checked. Of ``gae``: advantages.
        sequence_logps: (S,) sums over scored tokens (means for SimPO and ORPO), from a loss module.
        dhidden, dweight: gradients, of the shapes of hidden (S, T, H) or packed (P, H) and the weight.
        schedule: the schedule that logitless chose, for the table.
        flops: of the step's GEMMs, from logitless's plan.
        predicted: seconds of each part of the step, from logitless's cost model, which covers GPUs only.
    """

    loss: Tensor | None = None
    token_logps: Tensor | None = None
    sequence_logps: Tensor | None = None
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    schedule: str = ""
    flops: int | None = None
    predicted: dict[str, float] | None = None


@dataclass
class Work:
    """A provider prepared for a case.

    Attributes:
        step: what is timed: forward and, where the case has one, backward. Its result is what is checked.
        token_logps: per-token log-probs by the same code, for a provider whose step yields only those of sequences.
        prepare: runs before each step and is not timed, for a step that overwrites its inputs.
    """

    step: Callable[[], Result]
    token_logps: Callable[[], Tensor] | None = None
    prepare: Callable[[], object] = lambda: None


Build = Callable[[Case, Inputs], Work]
WhyNot = Callable[[Case, torch.device], list[str]]


@dataclass(frozen=True)
class Provider:
    """One entry of the registry.

    Attributes:
        name: its name in ``--providers`` and in the table.
        build: prepares it for a case.
        tasks: the tasks that it computes, see :class:`~.cases.Case`.
        why_not: every reason why it cannot run a case on a device (package missing, dtype unsupported ...).
        roofline: it computes nothing that could be checked; the others are compared with it.
        warm_up: its first step compiles or allocates for good, so memory is measured on the second.
        quick: whether ``--quick`` runs it by default.
    """

    name: str
    build: Build
    tasks: frozenset[str]
    why_not: WhyNot = lambda case, device: []
    roofline: bool = False
    warm_up: bool = False
    quick: bool = True

    def reasons(self, case: Case, device: torch.device) -> list[str]:
        """Every reason why it cannot run a case; empty when it can."""
        reasons = self.why_not(case, device)
        if case.task not in self.tasks:
            reasons = [f"does not compute {case.task}, only {', '.join(sorted(self.tasks))}", *reasons]
        return reasons


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, *, tasks: Iterable[str], **options: Any) -> Callable[[Build], Build]:
    """Register the decorated function as a provider; ``options`` are those of :class:`Provider`.

    Example:
        >>> @provider("mine", tasks={"logps"})
        ... def mine(case, inputs):
        ...     return Work(lambda: Result())
        >>> PROVIDERS.pop("mine").name
        'mine'
    """

    def register(build: Build) -> Build:
        if name in PROVIDERS:
            raise ValueError(f"provider name {name!r} is taken")
        PROVIDERS[name] = Provider(name, build, frozenset(tasks), **options)
        return build

    return register


def not_installed(*packages: str) -> list[str]:
    """One reason for each package that cannot be imported."""
    return [f"package {name} is not installed" for name in packages if not importlib.util.find_spec(name)]
