"""The registry of providers: who can be benchmarked, on what, and every reason why not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.planner.plan import Plan

from .cases import Case, Inputs


@dataclass
class Result:
    """What one timed step computed; ``None`` where the provider does not expose it.

    Attributes:
        loss: 0-dim.
        token_logps: (S, T) or, of packed tokens, (P,); ignored positions are not looked at. Of ``gae``: advantages.
        sequence_logps: (S,) sums over scored tokens (their means for SimPO and ORPO), from a loss module.
        dhidden, dweight: gradients, of the shapes of hidden (S, T, H) or packed (P, H) and the weight.
        schedule: what was done, for the table.
        flops: of the step's GEMMs, as logitless's plan has them.
        predicted: seconds of each part of the step, by logitless's cost model, which knows GPUs alone.
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
    """A provider made ready for a case.

    Attributes:
        step: what is timed: forward and, where the case has one, backward. Its result is what is checked.
        token_logps: per-token log-probs by the same code, for a provider whose step yields only those of sequences.
        prepare: run before each step and not timed, for a step that overwrites its inputs.
    """

    step: Callable[[], Result]
    token_logps: Callable[[], Tensor] | None = None
    prepare: Callable[[], object] = lambda: None


Build = Callable[[Case, Inputs], Work]
WhyNot = Callable[[Case, torch.device], list[str]]


@dataclass(frozen=True)
class Provider:
    """One entry of the registry; see :func:`provider`."""

    name: str
    build: Build
    tasks: frozenset[str]
    why_not: WhyNot
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


def _always(case: Case, device: torch.device) -> list[str]:
    return []


def provider(
    name: str,
    *,
    tasks: Iterable[str],
    why_not: WhyNot = _always,
    roofline: bool = False,
    warm_up: bool = False,
    quick: bool = True,
) -> Callable[[Build], Build]:
    """Register the decorated function as a provider. This is all that it takes to add one.

    Args:
        name: what ``--providers`` and the table call it.
        tasks: the tasks that it computes: ``logps``, names of :data:`~.losses.LOSSES` or
            :data:`~.policy_losses.POLICY_LOSSES`, ``gae``.
        why_not: every reason why it cannot run a case on a device (package missing, dtype unsupported ...).
        roofline: it computes nothing that could be checked, and is what the others are compared with.
        warm_up: its first step compiles something or allocates for good, so memory is measured on the second.
        quick: whether ``--quick`` runs it unasked.

    Raises:
        ValueError: when the name is taken.

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
        PROVIDERS[name] = Provider(name, build, frozenset(tasks), why_not, roofline, warm_up, quick)
        return build

    return register


def not_installed(package: str) -> list[str]:
    """The reason, if there is one, why a package cannot be imported."""
    return [] if importlib.util.find_spec(package) else [f"package {package} is not installed"]


def of_plan(plan: Plan | None) -> dict[str, Any]:
    """What a result tells of logitless's plan."""
    if plan is None:
        return {}
    predicted = None if plan.cost is None else {part.name: part.seconds for part in plan.cost.parts}
    return {"schedule": plan.schedule, "flops": plan.flops, "predicted": predicted}


def finish(loss: Tensor, inputs: Inputs, *, token_logps: Tensor | None = None, **more: Any) -> Result:
    """The backward pass, where there is one, and the result."""
    grads = dict(zip(map(id, inputs.leaves), torch.autograd.grad(loss, inputs.leaves))) if inputs.leaves else {}
    return Result(
        loss=loss.detach(),
        token_logps=None if token_logps is None else token_logps.detach(),
        dhidden=grads.get(id(inputs.hidden)),
        dweight=grads.get(id(inputs.weight)),
        **more,
    )
