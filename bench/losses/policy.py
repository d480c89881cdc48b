"""Policy losses of per-token log-probs, padded (S, T) or packed (P,), in any floating dtype; and advantages by definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .inputs import LossInputs

#: Constants of each loss, for every provider. The weight of the entropy bonus is larger than in practice, so that a wrong
#: gradient of the entropy is not hidden by that of the log-probs.
EPSILON_LOW, EPSILON_HIGH, PPO_CLIP, ENTROPY_COEF = 0.2, 0.28, 0.2, 0.1
#: Discount and trace decay of generalized advantage estimation.
GAMMA, LAMBDA = 1.0, 0.95


def _mean(values: Tensor, scored: Tensor) -> Tensor:
    return torch.where(scored, values, 0).sum() / scored.sum()


def _clipped(logps: Tensor, inputs: LossInputs, low: float, high: float) -> Tensor:
    """Mean over scored tokens of PPO's clipped loss, https://huggingface.co/papers/1707.06347 eq. 7."""
    advantages = inputs.advantages.to(logps.dtype)
    ratios = torch.where(inputs.scored, logps - inputs.old_logps.to(logps.dtype), 0).exp()
    return _mean(-torch.min(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages), inputs.scored)


def dapo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """https://huggingface.co/papers/2503.14476 eq. 8: one advantage per sequence, a mean over tokens."""
    return _clipped(logps, inputs, EPSILON_LOW, EPSILON_HIGH)


def dapo_entropy(logps: Tensor, inputs: LossInputs, entropies: Tensor | None = None) -> Tensor:
    """The same minus a bonus for the mean entropy of scored tokens."""
    assert entropies is not None
    return dapo(logps, inputs) - ENTROPY_COEF * _mean(entropies, inputs.scored)


def ppo(logps: Tensor, inputs: LossInputs) -> Tensor:
    """PPO with one advantage per token."""
    return _clipped(logps, inputs, PPO_CLIP, PPO_CLIP)


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {"dapo": dapo, "dapo-entropy": dapo_entropy, "ppo": ppo}

Numbers = TypeVar("Numbers", list[float], Tensor)


def loop_over_tokens(rewards: Numbers, values: Numbers, bounds: list[int], advantages: Numbers) -> Numbers:
    """Generalized advantage estimates by definition, https://huggingface.co/papers/1506.02438 eq. 16, one token at a time.

    rewards, values (P,); bounds (S + 1,) of the segments; advantages (P,), overwritten. Python's floats are float64.
    """
    for start, stop in zip(bounds, bounds[1:]):
        following: Any = 0.0
        advantage: Any = 0.0
        for i in range(stop - 1, start - 1, -1):
            value = values[i]
            advantage = rewards[i] + GAMMA * following - value + GAMMA * LAMBDA * advantage
            advantages[i] = advantage
            following = value
    return advantages
