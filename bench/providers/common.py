"""What providers share: the step of a function of log-probs, the backward pass, and reasons why a provider cannot run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.backends.interface import Call
from logitless.kernels.backends.registry import get_backend

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, WhyNot, Work, not_installed
from ..losses import POLICY_LOSSES, PREFERENCE_LOSSES, loss_of

POLICY_TASKS = frozenset(POLICY_LOSSES)
PREFERENCE_TASKS = frozenset(PREFERENCE_LOSSES)
#: Tasks of log-probs of padded sequences.
TOKEN_TASKS = PREFERENCE_TASKS | {"logps"}

#: hidden (N, H), weight (V, H), labels (N,) -> log-probs and, where the task asks for them, entropies, (N,) each.
TokenValues = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor | None]"]


def finish(loss: Tensor, inputs: Inputs, *, token_logps: Tensor | None = None, **more: Any) -> Result:
    """The backward pass, where there is one, and the result."""
    leaves = {name: t for name, t in (("dhidden", inputs.hidden), ("dweight", inputs.weight)) if t.requires_grad}
    if leaves:
        more |= zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    return Result(loss.detach(), None if token_logps is None else token_logps.detach(), **more)


def on_positions(case: Case, inputs: Inputs, values: TokenValues, chosen: Tensor | None) -> Work:
    """Log-probs of some positions, and the task's loss behind them in plain torch.

    chosen: bool, shaped like the labels; includes every scored position. ``None``: all positions, without copying them.
    """
    loss_fn, scored = loss_of(case.task), inputs.scored
    labels = inputs.labels.clamp(min=0)
    labels = labels.flatten() if chosen is None else labels[chosen]

    def spread(found: Tensor | None) -> Tensor | None:
        if found is None:
            return None
        if chosen is None:
            return torch.where(scored, found.view(scored.shape), 0)
        return found.new_zeros(chosen.shape).masked_scatter(chosen, found)

    def step() -> Result:
        hidden = inputs.hidden.flatten(0, -2) if chosen is None else inputs.hidden[chosen]
        logps, entropies = map(spread, values(hidden, inputs.weight, labels))
        assert logps is not None
        return finish(loss_fn(logps, inputs, entropies), inputs, token_logps=logps)

    return Work(step)


def copies(*sources: Tensor) -> Work:
    """One read and one write of each element."""
    pairs = [(source, torch.empty_like(source)) for source in sources]

    def step() -> Result:
        for source, destination in pairs:
            destination.copy_(source)
        return Result()

    return Work(step)


def all_of(*conditions: WhyNot) -> WhyNot:
    """The reasons of all conditions."""
    return lambda case, device: [reason for condition in conditions for reason in condition(case, device)]


def needs(*packages: str) -> WhyNot:
    return lambda case, device: not_installed(*packages)


def no_softcap(case: Case, device: torch.device) -> list[str]:
    return [f"has no soft-cap, and the shape asks for {case.shape.softcap:g}"] if case.shape.softcap else []


def needs_gpu(case: Case, device: torch.device) -> list[str]:
    reasons = [] if device.type == "cuda" else ["needs a CUDA device"]
    return [*reasons, "takes bf16 and fp16 only"] if case.shape.dtype == "fp32" else reasons


def needs_backend(name: str) -> WhyNot:
    """One of logitless's backends."""

    def why_not(case: Case, device: torch.device) -> list[str]:
        backend, dtype = get_backend(name), case.shape.torch_dtype
        if backend.name == "triton" and device.type == "cpu":
            return ["Triton's interpreter is no kernel to time"]
        return [*backend.why_unavailable(), *backend.why_not(Call(device, dtype, dtype))]

    return why_not
