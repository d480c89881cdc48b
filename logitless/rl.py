"""Reinforcement learning on log-probabilities: advantages, KL estimates, masked statistics, value and reward-model losses."""

from logitless.fused.policy.importance import importance_sampling_ratio
from logitless.fused.rl.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
)
from logitless.fused.rl.gae import GAE, gae
from logitless.fused.rl.kl import KL_ESTIMATORS, kl_estimate
from logitless.fused.rl.masked import masked_mean, masked_var, masked_whiten
from logitless.fused.rl.reward_model import BradleyTerryLoss, RewardModelOutput, last_token_pool
from logitless.fused.rl.value_tracker import ValueTracker
from logitless.fused.rl.values import ValueLoss, value_loss

__all__ = [
    "GAE",
    "KL_ESTIMATORS",
    "BradleyTerryLoss",
    "RewardModelOutput",
    "ValueLoss",
    "ValueTracker",
    "gae",
    "group_advantages",
    "importance_sampling_ratio",
    "kl_estimate",
    "kl_shaped_rewards",
    "last_token_pool",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "reinforce_plus_plus_advantages",
    "value_loss",
]
