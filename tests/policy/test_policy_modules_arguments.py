"""Bad and unused options and arguments of the policy losses are errors that name them."""

from __future__ import annotations

import math

import pytest
import torch

import logitless as ll
from logitless.fused.policy.importance import importance_sampling_ratio

from ..helpers import ENDS_THE_PROCESS, make_case
from .cases import GRPO, PPO

EVERY_BACKEND = True


X, W, Y = torch.zeros(2, 3, 8), torch.zeros(11, 8), torch.tensor([[1, 2, -100], [3, 4, 5]])
A = torch.ones(2)
T = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PPO(clip_low=-0.1), "clip_low"),
        (lambda: PPO(clip_low=1.5), "clip_low"),
        (lambda: PPO(clip_low="0.2"), "clip_low"),
        (lambda: PPO(clip_low=True), "clip_low"),
        (lambda: PPO(clip_high=-0.1), "clip_high"),
        (lambda: PPO(clip_high=float("inf")), "clip_high"),
        (lambda: PPO(dual_clip=1.2), "dual_clip must be above"),
        (lambda: PPO(dual_clip=1.25, clip_high=0.28), "dual_clip must be above"),
        (lambda: PPO(kl_coef=-1.0), "kl_coef"),
        (lambda: PPO(kl_coef=0.1, kl_estimator="k4"), "kl_estimator"),
        (lambda: PPO(kl_coef=0.1, kl_estimator="k2+"), "kl_estimator"),
        (lambda: PPO(kl_estimator="k1"), "kl_estimator.*kl_coef above 0"),
        (lambda: PPO(entropy_coef=float("nan")), "entropy_coef"),
        (lambda: PPO(entropy_coef=None), "entropy_coef"),
        (lambda: PPO(aggregation="mean"), "aggregation"),
        (lambda: PPO(aggregation="fixed-length"), "max_length must be at least 1"),
        (lambda: PPO(aggregation="fixed-length", max_length=0), "max_length must be at least 1"),
        (lambda: PPO(aggregation="fixed-length", max_length=9.0), "max_length must be an int"),
        (lambda: PPO(max_length=9), "max_length is used"),
        (lambda: PPO(metrics=1), "metrics"),
        (lambda: PPO(ignore_index=1.5), "ignore_index"),
        (lambda: PPO(importance_sampling_mode="token"), "importance_sampling_mode"),
        (lambda: PPO(importance_sampling_clip_max=2.0), "importance_sampling_clip_min and _max need"),
        (lambda: PPO(importance_sampling_clip_min=0.5), "importance_sampling_clip_min and _max need"),
        (
            lambda: PPO(importance_sampling_mode="token_mask", importance_sampling_clip_min=4.0),
            "importance_sampling_clip_min must be less",
        ),
        (
            lambda: PPO(importance_sampling_mode="token_mask", importance_sampling_clip_max=-4.0),
            "importance_sampling_clip_max",
        ),
        (
            lambda: PPO(importance_sampling_mode="token_truncate", importance_sampling_clip_max=None),
            "importance_sampling_clip_min or importance_sampling_clip_max",
        ),
        (lambda: GRPO("ppo"), "loss_type"),
        (lambda: GRPO(["dapo"]), "loss_type"),
        (lambda: GRPO(importance_sampling_level="batch"), "importance_sampling_level"),
        (lambda: GRPO(epsilon_low=-0.1), "epsilon_low"),
        (lambda: GRPO(epsilon_low=1.1), "epsilon_low"),
        (lambda: GRPO(epsilon_high=-0.1), "epsilon_high"),
        (lambda: GRPO(delta=1.2), "delta must be above"),
        (lambda: GRPO(delta=1.25, epsilon_high=0.28), "delta must be above"),
        (lambda: GRPO(beta=-0.1), "beta"),
        (lambda: GRPO(use_bias_correction_kl=False), "use_bias_correction_kl"),
        (lambda: GRPO(use_bias_correction_kl=0, beta=0.1), "use_bias_correction_kl"),
        (lambda: GRPO("dr_grpo"), "max_completion_length"),
        (lambda: GRPO("dr_grpo", max_completion_length=0), "max_completion_length"),
        (lambda: GRPO("dapo", max_completion_length=5), "max_completion_length is not used by loss_type='dapo'"),
        (lambda: GRPO("cispo", epsilon_low=0.1), "epsilon_low is not used by loss_type='cispo'"),
        (lambda: GRPO("sapo", epsilon_high=0.1), "epsilon_high is not used by loss_type='sapo'"),
        (lambda: GRPO("vespo", epsilon_low=0.1), "epsilon_low is not used by loss_type='vespo'"),
        (lambda: GRPO("cispo", delta=4.0), "delta is not used by loss_type='cispo'"),
        (lambda: GRPO("vespo", importance_sampling_level="sequence"), "importance_sampling_level is not used"),
        (lambda: GRPO(sapo_temperature_pos=2.0), "sapo_temperature_pos is not used"),
        (lambda: GRPO(sapo_temperature_neg=2.0), "sapo_temperature_neg is not used"),
        (lambda: GRPO("sapo", sapo_temperature_neg=0.0), "sapo_temperature_neg"),
        *((lambda n=n: GRPO(**{n: 9.0}), f"{n} is not used") for n in ("vespo_k_pos", "vespo_lambda_pos")),
        *((lambda n=n: GRPO(**{n: 9.0}), f"{n} is not used") for n in ("vespo_k_neg", "vespo_lambda_neg")),
        *((lambda n=n: GRPO("vespo", **{n: -1.0}), n) for n in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg")),
        (lambda: GRPO(off_policy_mask_threshold=-0.1), "off_policy_mask_threshold"),
        (lambda: GRPO(top_entropy_quantile=0.0), "top_entropy_quantile"),
        (lambda: GRPO(top_entropy_quantile=1.1), "top_entropy_quantile"),
        (lambda: ll.FusedLinearPolicyLoss(None), "fn must be callable"),
        (lambda: ll.FusedLinearPolicyLoss(len, group="pair"), "group"),
        (lambda: ll.FusedLinearPolicyLoss(len, uses_reference=1), "uses_reference"),
        (lambda: ll.FusedLinearPolicyLoss(len, needs_reference="yes"), "needs_reference"),
        (lambda: ll.FusedLinearPolicyLoss(len, uses_entropy=1), "uses_entropy"),
        (lambda: ll.FusedLinearPolicyLoss(len, entropy_gradient=1), "entropy_gradient"),
    ],
)
def test_bad_options_are_errors_that_name_them(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


MASKED = PPO(importance_sampling_mode="token_mask")


@pytest.mark.parametrize(
    ("loss", "changed", "words"),
    [
        (PPO(), {"advantages": None}, "advantages must be a torch.Tensor"),
        (PPO(), {"advantages": [1.0, 1.0]}, "advantages must be a torch.Tensor"),
        (PPO(), {"advantages": torch.ones(3)}, r"advantages must have shape \(2, 3\) or \(2,\)"),
        (PPO(), {"advantages": torch.ones(3, 2)}, "advantages must have shape"),
        (PPO(), {"advantages": torch.ones(2, dtype=torch.long)}, "advantages must be floating point"),
        (PPO(), {"advantages": torch.ones(2, device="meta")}, "advantages is on meta"),
        (PPO(), {"old_logps": A}, r"old_logps must have shape \(2, 3\)"),
        (PPO(), {"old_logps": T.long()}, "old_logps must be floating point"),
        (PPO(), {"old_logps": 0.0}, "old_logps must be a torch.Tensor"),
        (PPO(kl_coef=0.1), {"ref_logps": A}, r"ref_logps must have shape \(2, 3\)"),
        (PPO(kl_coef=0.1), {}, "needs a reference: pass ref_logps"),
        (GRPO(beta=0.1), {}, "needs a reference: pass ref_logps"),
        (PPO(), {"ref_logps": T}, "ref_logps is given, but this loss does not use a reference"),
        (PPO(), {"ref_hidden": X, "ref_weight": W}, "ref_hidden is given, but"),
        (PPO(), {"ref_weight": W}, "ref_weight is given, but"),
        (GRPO(beta=0.1), {"ref_logps": T, "ref_hidden": X, "ref_weight": W}, "ref_logps and ref_hidden are given"),
        (GRPO(beta=0.1), {"ref_logps": T, "ref_bias": W[:, 0]}, "ref_logps and ref_bias are given"),
        (GRPO(beta=0.1), {"ref_hidden": X}, "ref_weight"),
        (GRPO(beta=0.1), {"ref_weight": W}, "reference|ref_hidden"),
        (GRPO(beta=0.1), {"ref_hidden": X[:1], "ref_weight": W}, "ref_hidden"),
        (GRPO(beta=0.1), {"ref_hidden": X, "ref_weight": W[:5]}, "ref_weight"),
        (PPO(), {"num_items_in_batch": 0}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": -3.0}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": "6"}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": float("inf")}, "num_items_in_batch"),
        (PPO(), {"num_items_in_batch": T}, "num_items_in_batch must be one number"),
        (PPO(), {"num_items_in_batch": torch.tensor(True)}, "num_items_in_batch must be one number"),
        (PPO(), {"sampling_logps": T}, "sampling_logps is given, but this loss does not use it"),
        (GRPO(), {"sampling_logps": T}, "sampling_logps is given, but this loss does not use it"),
        (MASKED, {"sampling_logps": T}, "old_logps is needed by importance_sampling_mode='token_mask'"),
        (MASKED, {"old_logps": T}, "sampling_logps is needed by importance_sampling_mode='token_mask'"),
        (MASKED, {"old_logps": T, "sampling_logps": A}, r"sampling_logps must have shape \(2, 3\)"),
        (MASKED, {"old_logps": T, "sampling_logps": T, "importance_sampling_ratio": T}, "importance_sampling_ratio is given"),
        (PPO(), {"importance_sampling_ratio": torch.ones(5)}, "importance_sampling_ratio must have shape"),
        (PPO(), {"importance_sampling_ratio": torch.ones(2, 1)}, "importance_sampling_ratio must have shape"),
        (GRPO(), {"entropy_threshold": 1.0}, "entropy_threshold is used with a top_entropy_quantile below 1"),
        (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": A}, "entropy_threshold must be one floating point"),
        (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": torch.tensor(1)}, "entropy_threshold must be one floating"),
        (GRPO(top_entropy_quantile=0.5), {"entropy_threshold": "1"}, "entropy_threshold"),
        (PPO(), {"labels": Y[0]}, "labels"),
        (PPO(), {"labels": Y.float()}, "labels"),
        pytest.param(PPO(), {"labels": Y + 7}, "labels must be", marks=pytest.mark.cpu_only(ENDS_THE_PROCESS)),
        (PPO(), {"cu_seqlens": torch.tensor([0, 6])}, "labels must have shape"),
        (PPO(), {"hidden": X.flatten(0, 1), "labels": Y.flatten()}, "labels must have shape .* no cu_seqlens"),
        (PPO(), {"hidden": X.flatten(0, 1), "labels": Y.flatten(), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        (PPO(), {"hidden": X.long()}, "hidden"),
        (PPO(), {"weight": W[:, :5]}, "weight"),
        (PPO(), {"bias": W}, "bias"),
        (PPO(), {"head": 1.0}, "head"),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument(loss, changed, words):
    given = {"hidden": X, "weight": W, "labels": Y, "advantages": A, **changed}
    with pytest.raises((TypeError, ValueError), match=words):
        loss(**given)


def test_advantages_are_needed():
    with pytest.raises(TypeError, match="advantages"):
        PPO()(X, W, Y)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mode": "token"}, "mode must be one of"),
        ({"clip_max": -1.0}, "clip_max"),
        ({"clip_min": 3.0}, "clip_min must be less than clip_max=3.0"),
        ({"mode": "sequence_truncate", "clip_max": None}, "clip_min or clip_max must be given"),
        ({"old_logps": T.long()}, "old_logps"),
        ({"sampling_logps": A}, "sampling_logps"),
        ({"mask": T}, "mask"),
        ({"mask": A.bool()}, "mask"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "old_logps|cu_seqlens"),
        ({"old_logps": T.flatten(), "sampling_logps": T.flatten(), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        ({"old_logps": T.flatten(), "sampling_logps": T.flatten()}, "old_logps|cu_seqlens"),
    ],
)
def test_bad_input_of_importance_sampling_ratio(changed, words):
    given = {"old_logps": T, "sampling_logps": T, **changed}
    with pytest.raises((TypeError, ValueError), match=words):
        importance_sampling_ratio(given.pop("old_logps"), given.pop("sampling_logps"), **given)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_importance_sampling_ratio_looks_at_no_masked_position(mode, dtype):
    g = torch.Generator().manual_seed(0)
    old, sampled = (torch.randn(3, 7, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    mask = torch.rand(3, 7, generator=g) < 0.6
    mask[1] = False
    found = []
    for value in (0.0, torch.nan, torch.inf):
        poisoned = (t.masked_fill(~mask, value) for t in (old, sampled))
        found.append(importance_sampling_ratio(*poisoned, mask=mask, mode=mode, clip_min=0.2, clip_max=4.0))
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.isfinite(found[0]).all()
    if mode.startswith("token"):
        assert (found[0][~mask] == 1).all()
    else:
        assert found[0][1] == 1


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf])
def test_num_items_in_batch_is_checked_as_a_tensor_too(value):
    case = make_case()
    with pytest.raises(ValueError, match="num_items_in_batch"):
        PPO()(case.hidden, case.weight, case.labels, advantages=torch.ones(4), num_items_in_batch=torch.tensor(value))
