"""Providers of the suite ``gae``: advantages from rewards and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import logitless as ll

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses.policy import GAMMA, LAMBDA, loop_over_tokens
from .common import copies

#: rewards (P,), values (P,) and cu_seqlens (S + 1,) -> advantages (P,)
Gae = Callable[[Tensor, Tensor, Tensor], Tensor]


@provider("copy:gae", tasks={"gae"}, roofline=True)
def copy(case: Case, inputs: Inputs) -> Work:
    """A copy of rewards and values: the fewest reads and writes of any scan."""
    return copies(inputs.packed.rewards, inputs.packed.values)


def _on_packed(name: str, **options: Any) -> Callable[[Gae], Gae]:
    """Register a function of packed tokens."""

    def register(fn: Gae) -> Gae:
        @provider(name, tasks={"gae"}, **options)
        def build(case: Case, inputs: Inputs) -> Work:
            packed = inputs.packed
            return Work(lambda: Result(token_logps=fn(packed.rewards, packed.values, packed.cu_seqlens)))

        return fn

    return register


def _only_on_cpus(case: Case, device: torch.device) -> list[str]:
    return [] if device.type == "cpu" else [f"would take minutes per step on {device.type}, with several launches per token"]


@_on_packed("loop:gae", why_not=_only_on_cpus)
def by_token(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """A loop over tokens, on the tensors."""
    return loop_over_tokens(rewards, values, cu_seqlens.tolist(), torch.empty_like(rewards))


@_on_packed("floats:gae")
def by_float(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same loop on Python's floats, including the conversions."""
    found = loop_over_tokens(rewards.tolist(), values.tolist(), cu_seqlens.tolist(), [0.0] * len(rewards))
    return torch.tensor(found, dtype=rewards.dtype, device=rewards.device)


@provider("padded:gae", tasks={"gae"})
def by_step(case: Case, inputs: Inputs) -> Work:
    """A loop over the steps of the longest sequence, for all sequences at once, as in PPO trainers."""
    rewards, values = inputs.rewards, inputs.values  # 0 in the padding

    def step() -> Result:
        advantage = following = torch.zeros_like(values[:, 0])
        found = []
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + GAMMA * following - values[:, t]
            advantage = delta + GAMMA * LAMBDA * advantage
            following = values[:, t]
            found.append(advantage)
        return Result(token_logps=torch.stack(found[::-1], dim=1))

    return Work(step)


@_on_packed("logitless:gae")
def fused(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``gae`` on the packed tokens."""
    return ll.gae(rewards, values, cu_seqlens=cu_seqlens, gamma=GAMMA, lam=LAMBDA).advantages
