"""logitless: log-probabilities and preference losses straight from hidden states and the lm-head weight, without logits."""

from logitless import integrations
from logitless.fused.at_head import AtHead, at_head, model_loss
from logitless.fused.batch import Loss, LossResult, Pairs, Sequences
from logitless.fused.losses.dpo import DPO_LOSSES
from logitless.fused.losses.kto import KTO_LOSSES
from logitless.fused.losses.simple import CPO_LOSSES
from logitless.fused.model_logps import model_logps, why_not_padding_free
from logitless.fused.modules import FusedLinearLoss, KTOOutput, PreferenceOutput
from logitless.fused.multi_objective import FusedLinearMultiObjectiveLoss, MultiObjectiveOutput, Objective
from logitless.fused.packing import PackedSequences, pack, unpack
from logitless.fused.policy.advantages import (
    group_advantages,
    kl_shaped_rewards,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
)
from logitless.fused.policy.batch import PolicyLoss, PolicyLossResult, Tokens
from logitless.fused.policy.grpo import GRPO_LOSSES
from logitless.fused.policy.importance import importance_sampling_ratio
from logitless.fused.policy.kl import KL_ESTIMATORS, kl_estimate
from logitless.fused.policy.masked import masked_mean, masked_var, masked_whiten
from logitless.fused.policy.modules import FusedLinearGRPOLoss, FusedLinearPolicyLoss, FusedLinearPPOLoss, PolicyOutput
from logitless.fused.policy.reward_model import BradleyTerryLoss, RewardModelOutput, last_token_pool
from logitless.fused.policy.tracker import ValueTracker
from logitless.fused.policy.values import ValueLoss, value_loss
from logitless.fused.preference import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from logitless.kernels.backends import available_backends, register_backend
from logitless.kernels.gae import GAE, gae
from logitless.kernels.grad_filter import skipped_share
from logitless.kernels.op import linear_logps
from logitless.kernels.plan import Plan, plan
from logitless.kernels.reference import reference_logps
from logitless.kernels.sequence import sequence_logps, shift
from logitless.kernels.settings import Settings, current_settings, settings
from logitless.kernels.spec import HeadSpec
from logitless.kernels.stats import OUTPUTS, TokenStats

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
    "FusedLinearLoss",
    "FusedLinearMultiObjectiveLoss",
    "FusedLinearORPOLoss",
    "FusedLinearPPOLoss",
    "FusedLinearPolicyLoss",
    "FusedLinearSimPOLoss",
    "HeadSpec",
    "KTOOutput",
    "Loss",
    "LossResult",
    "MultiObjectiveOutput",
    "Objective",
    "PackedSequences",
    "Pairs",
    "Plan",
    "PolicyLoss",
    "PolicyLossResult",
    "PolicyOutput",
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
