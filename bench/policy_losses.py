"""Policy losses in plain torch, as functions of per-token values: what peers without a fused loss run, and the reference.

Written apart from ``logitless.fused.policy`` on purpose: the check of a benchmarked result must not share its formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Inputs

#: Constants of each loss, for every provider. The weight of the entropy bonus is larger than anybody's, so that a wrong
#: gradient of the entropy is not lost beside that of the log-probs.
EPSILON_LOW, EPSILON_HIGH, PPO_CLIP, ENTROPY_COEF = 0.2, 0.28, 0.2, 0.1
#: Discount and weight of longer horizons of generalized advantage estimation.
GAMMA, LAMBDA = 1.0, 0.95


def _clipped(logps: Tensor, inputs: Inputs, low: float, high: float) -> Tensor:
    """Mean over scored tokens of PPO's clipped loss, https://huggingface.co/papers/1707.06347 eq. 7."""
    rollouts = inputs.rollouts
    assert rollouts is not None
    scored, advantages = inputs.scored, rollouts.advantages.to(logps.dtype)
    ratios = torch.where(scored, logps - rollouts.old_logps.to(logps.dtype), 0).exp()
    losses = -torch.min(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    return torch.where(scored, losses, 0).sum() / scored.sum()


def dapo(logps: Tensor, inputs: Inputs, entropies: Tensor | None = None) -> Tensor:
    """https://huggingface.co/papers/2503.14476 eq. 8: one advantage a sequence, a mean over tokens."""
    return _clipped(logps, inputs, EPSILON_LOW, EPSILON_HIGH)


def dapo_entropy(logps: Tensor, inputs: Inputs, entropies: Tensor | None = None) -> Tensor:
    """The same less a bonus for the mean entropy of scored tokens."""
    assert entropies is not None
    scored = inputs.scored
    bonus = torch.where(scored, entropies, 0).sum() / scored.sum()
    return dapo(logps, inputs) - ENTROPY_COEF * bonus


def ppo(logps: Tensor, inputs: Inputs, entropies: Tensor | None = None) -> Tensor:
    """PPO with one advantage a token."""
    return _clipped(logps, inputs, PPO_CLIP, PPO_CLIP)


#: Functions of log-probs and, where :func:`uses_entropy`, entropies, shaped like the labels of inputs whose layout is either
#: padded (S, T) or packed (P,); in any floating dtype; 0-dim.
POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {"dapo": dapo, "dapo-entropy": dapo_entropy, "ppo": ppo}


def uses_entropy(task: str) -> bool:
    """Whether the loss has a gradient at the entropies."""
    return task == "dapo-entropy"


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
