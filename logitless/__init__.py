"""logitless: log-probabilities and preference losses straight from hidden states and the lm-head weight, without logits."""

from logitless.fused.models.at_head import at_head, model_loss
from logitless.fused.models.logps import model_logps
from logitless.fused.models.packing import PackedSequences, pack, unpack
from logitless.fused.policy.base import FusedLinearPolicyLoss
from logitless.fused.policy.loss import PolicyLoss, PolicyLossResult, Tokens
from logitless.fused.policy.modules import FusedLinearGRPOLoss, FusedLinearPPOLoss
from logitless.fused.preference.base import FusedLinearPreferenceLoss
from logitless.fused.preference.loss import Pairs, PreferenceLoss, PreferenceLossResult, Sequences
from logitless.fused.preference.modules import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearIPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from logitless.fused.preference.objectives import FusedLinearMultiObjectiveLoss, Objective
from logitless.fused.rl.advantages import group_advantages
from logitless.fused.rl.gae import gae
from logitless.fused.rl.reward_model import BradleyTerryLoss
from logitless.fused.rl.values import value_loss
from logitless.kernels.backends.registry import available_backends, register_backend
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import LoRAWeight
from logitless.kernels.core.settings import settings
from logitless.kernels.core.stats import TokenStats
from logitless.kernels.linear_logps import linear_logps
from logitless.kernels.parallel.vocab_parallel import VocabParallel
from logitless.kernels.planner.plan import Plan, plan
from logitless.kernels.reference import reference_logps
from logitless.kernels.sequence_logps import sequence_logps, shift
from logitless.kernels.tile.grad_filter import skipped_share

from . import integrations, models, rl

__version__ = "0.1.0"

__all__ = [
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
    "LoRAWeight",
    "Objective",
    "PackedSequences",
    "Pairs",
    "Plan",
    "PolicyLoss",
    "PolicyLossResult",
    "PreferenceLoss",
    "PreferenceLossResult",
    "Sequences",
    "TokenStats",
    "Tokens",
    "VocabParallel",
    "at_head",
    "available_backends",
    "gae",
    "group_advantages",
    "integrations",
    "linear_logps",
    "model_logps",
    "model_loss",
    "models",
    "pack",
    "plan",
    "reference_logps",
    "register_backend",
    "rl",
    "sequence_logps",
    "settings",
    "shift",
    "skipped_share",
    "unpack",
    "value_loss",
]
