"""Providers of the suite ``gae``: advantages from rewards and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import logitless as ll

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses.policy import GAMMA, LAMBDA, loop_over_tokens


@provider("copy:gae", tasks={"gae"}, roofline=True)
def copy(case: Case, inputs: Inputs) -> Work:
    """A copy of rewards and values: the fewest reads and writes of any scan."""
    rollouts = inputs.packed.policy
    pairs = [(t, torch.empty_like(t)) for t in (rollouts.rewards, rollouts.values)]

    def step() -> Result:
        for source, destination in pairs:
            destination.copy_(source)
        return Result()

    return Work(step)


def _on_packed(inputs: Inputs, fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    """``fn`` of rewards (P,), values (P,) and cu_seqlens (S + 1,)."""
    rollouts = inputs.packed.policy
    return Work(lambda: Result(token_logps=fn(rollouts.rewards, rollouts.values, rollouts.cu_seqlens)))


def _only_on_cpus(case: Case, device: torch.device) -> list[str]:
    return [] if device.type == "cpu" else [f"would take minutes per step on {device.type}, with several launches per token"]


@provider("loop:gae", tasks={"gae"}, why_not=_only_on_cpus)
def by_token(case: Case, inputs: Inputs) -> Work:
    """A loop over tokens, on the tensors."""

    def fn(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return loop_over_tokens(rewards, values, cu_seqlens.tolist(), torch.empty_like(rewards))

    return _on_packed(inputs, fn)


@provider("floats:gae", tasks={"gae"})
def by_float(case: Case, inputs: Inputs) -> Work:
    """The same loop on Python's floats, including the conversions."""

    def fn(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        found = loop_over_tokens(rewards.tolist(), values.tolist(), cu_seqlens.tolist(), [0.0] * len(rewards))
        return torch.tensor(found, dtype=rewards.dtype, device=rewards.device)

    return _on_packed(inputs, fn)


@provider("padded:gae", tasks={"gae"})
def by_step(case: Case, inputs: Inputs) -> Work:
    """A loop over the steps of the longest sequence, for all sequences at once, as in PPO trainers."""

    def step() -> Result:
        rewards, values = inputs.policy.rewards, inputs.policy.values  # 0 in the padding
        advantage = following = torch.zeros_like(values[:, 0])
        found = []
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + GAMMA * following - values[:, t]
            advantage = delta + GAMMA * LAMBDA * advantage
            following = values[:, t]
            found.append(advantage)
        return Result(token_logps=torch.stack(found[::-1], dim=1))

    return Work(step)


@provider("logitless:gae", tasks={"gae"})
def fused(case: Case, inputs: Inputs) -> Work:
    """``gae`` on the packed tokens."""

    def fn(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ll.gae(rewards, values, cu_seqlens=cu_seqlens, gamma=GAMMA, lam=LAMBDA).advantages

    return _on_packed(inputs, fn)
