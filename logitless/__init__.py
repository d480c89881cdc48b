"""logitless: log-probabilities and preference losses straight from hidden states and the lm-head weight, without logits."""

from logitless.fused.models.at_head import AtHead, at_head, model_loss
from logitless.fused.models.model_logps import model_logps, why_not_padding_free
from logitless.fused.models.packing import PackedSequences, pack, unpack
from logitless.fused.policy.base import FusedLinearPolicyLoss, PolicyOutput
from logitless.fused.policy.importance import importance_sampling_ratio
from logitless.fused.policy.loss import PolicyLoss, PolicyLossResult, Tokens
from logitless.fused.policy.losses.grpo import GRPO_LOSSES
from logitless.fused.policy.modules import FusedLinearGRPOLoss, FusedLinearPPOLoss
from logitless.fused.preference.base import FusedLinearPreferenceLoss, KTOOutput, PreferenceOutput
from logitless.fused.preference.loss import Pairs, PreferenceLoss, PreferenceLossResult, Sequences
from logitless.fused.preference.losses.dpo import DPO_LOSSES
from logitless.fused.preference.losses.kto import KTO_LOSSES
from logitless.fused.preference.losses.simple import CPO_LOSSES
from logitless.fused.preference.modules import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from logitless.fused.preference.objectives import FusedLinearMultiObjectiveLoss, MultiObjectiveOutput, Objective
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
from logitless.kernels.backends.registry import available_backends, register_backend
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.settings import Settings, current_settings, settings
from logitless.kernels.core.stats import OUTPUTS, TokenStats
from logitless.kernels.linear_logps import linear_logps
from logitless.kernels.planner.plan import Plan, plan
from logitless.kernels.reference import reference_logps
from logitless.kernels.sequence_logps import sequence_logps, shift
from logitless.kernels.tile.grad_filter import skipped_share

from . import integrations

__version__ = "0.1.0"

__all__ = [
    "CPO_LOSSES",
    "DPO_LOSSES",
    "GAE",
    "GRPO_LOSSES",
    "KL_ESTIMATORS",
    "KTO_LOSSES",
    "OUTPUTS",
    "AtHead",
    "BradleyTerryLoss",
    "FusedLinearCPOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearGRPOLoss",
    "FusedLinearIPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearMultiObjectiveLoss",
    "FusedLinearORPOLoss",
    "FusedLinearPPOLoss",
    "FusedLinearPolicyLoss",
    "FusedLinearPreferenceLoss",
    "FusedLinearSimPOLoss",
    "HeadSpec",
    "KTOOutput",
    "MultiObjectiveOutput",
    "Objective",
    "PackedSequences",
    "Pairs",
    "Plan",
    "PolicyLoss",
    "PolicyLossResult",
    "PolicyOutput",
    "PreferenceLoss",
    "PreferenceLossResult",
    "PreferenceOutput",
    "RewardModelOutput",
    "Sequences",
    "Settings",
    "TokenStats",
    "Tokens",
    "ValueLoss",
    "ValueTracker",
    "at_head",
    "available_backends",
    "current_settings",
    "gae",
    "group_advantages",
    "importance_sampling_ratio",
    "integrations",
    "kl_estimate",
    "kl_shaped_rewards",
    "last_token_pool",
    "leave_one_out_advantages",
    "linear_logps",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "model_logps",
    "model_loss",
    "pack",
    "plan",
    "reference_logps",
    "register_backend",
    "reinforce_plus_plus_advantages",
    "sequence_logps",
    "settings",
    "shift",
    "skipped_share",
    "unpack",
    "value_loss",
    "why_not_padding_free",
]
