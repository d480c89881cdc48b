"""From finite log-probabilities no loss makes an infinity or a NaN, in its value, its metrics or its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import logitless as ll
from logitless.fused.bounds import LARGEST, LARGEST_ROOT, bounded_square
from logitless.fused.policy.importance import IMPORTANCE_SAMPLING_MODES
from logitless.fused.policy.loss import PolicyLoss, Tokens
from logitless.fused.policy.losses.grpo import CLIPPED, GRPO_LOSSES, GRPOOptions, grpo
from logitless.fused.policy.losses.ppo import KL_PENALTIES, ppo
from logitless.fused.preference.loss import Pairs, PreferenceLoss, Sequences, Totals
from logitless.fused.preference.losses.dpo import (
    BATCH_COUPLED,
    DIVERGENT,
    DPO_LOSSES,
    F_DIVERGENCES,
    SMOOTHED,
    DPOOptions,
    dpo,
    f_divergence_score,
)
from logitless.fused.preference.losses.kto import KTO_LOSSES, kto
from logitless.fused.preference.losses.simple import CPO_LOSSES, alpha_reward, cpo, log_odds, orpo, simpo
from logitless.kernels.backends.registry import choose_elementwise

SIZE = 12  # sequences of a preference loss (six pairs), tokens of a policy loss
OFFSETS = torch.tensor([0, 0, 3, SIZE])  # the first sequence has no token
SEGMENT_SUM = choose_elementwise(OFFSETS.device, "segment_sum").segment_sum
Results: TypeAlias = tuple[Tensor, dict[str, Tensor]]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

#: Where exponentials of float32 and float64 overflow or vanish, and where 1 - p loses its digits.
EDGES = [0.0, -1e-45, -1e-12, -1e-8, -1e-7, -1e-3, -math.log(2), -1.0, -40.0, -79.9, -80.1, -89.0, -95.0, -104.0, -750.0, -1e4]
logp = st.sampled_from(EDGES) | st.floats(-1e4, 0)


def several(element: st.SearchStrategy[float], size: int = SIZE) -> st.SearchStrategy[list[float]]:
    return st.lists(element, min_size=size, max_size=size)


def swept(examples: int = 12) -> Callable[..., Any]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def not_finite(results: dict[str, Results], leaves: dict[str, Tensor]) -> list[str]:
    """What is infinite or NaN in float32, to which the engine rounds: losses, their sum, other results, gradients."""
    found = {}
    for name, (losses, others) in results.items():
        found[f"{name}: losses"], found[f"{name}: loss"] = losses, losses.sum()
        found |= {f"{name}: {other}": value for other, value in others.items()}
    total = torch.stack([losses.sum() for losses, _ in results.values()]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found |= {f"gradient of {leaf}": g for leaf, g in zip(leaves, gradients, strict=True) if g is not None}
    if torch.cat([value.detach().reshape(-1) for value in found.values()]).float().isfinite().all():
        return []
    return [f"{what} is {value.tolist()}" for what, value in found.items() if not value.float().isfinite().all()]


def assert_finite(evaluate: Callable[[str], Results], names: Iterable[str], leaves: dict[str, Tensor]) -> None:
    """All losses at once, and one by one where that fails."""
    if not_finite({name: evaluate(name) for name in names}, leaves):
        for name in names:
            wrong = not_finite({name: evaluate(name)}, leaves)
            assert not wrong, f"{name}: {wrong} at { ({leaf: value.tolist() for leaf, value in leaves.items()}) }"


# Preference losses


def smoothing(name: str) -> list[float]:
    if name == "exo_pair":
        return [0.1, 0.9]
    return [0.0, 0.3] if name in SMOOTHED else [0.0]


def preference_losses(beta: float) -> dict[str, PreferenceLoss]:
    found = {}
    for name in DPO_LOSSES:
        for e in smoothing(name):
            given = DPOOptions(beta, e)
            for kind in F_DIVERGENCES if name in DIVERGENT else ["reverse_kl"]:
                for alpha in (-1.0, 0.5, 0.99, 1.00001, 2.0) if kind == "alpha_divergence" else (0.5,):
                    found[f"{name} {e} {kind} {alpha}"] = dpo(
                        [name], [1.0], given, f_divergence_type=kind, f_alpha_divergence_coef=alpha
                    )
            if name not in BATCH_COUPLED:
                found[f"{name} {e} WPO"] = dpo([name], [1.0], given, use_weighting=True)
    for tau in (1e-3, 1.0, 4.0):
        found[f"discopop tau {tau}"] = dpo(["discopop"], [1.0], DPOOptions(beta, discopop_tau=tau))
    for kind in F_DIVERGENCES:
        sums = DPOOptions(beta, length_normalize=False)
        found[f"ipo sums {kind}"] = dpo(["ipo"], [1.0], sums, f_divergence_type=kind)
    for alpha in (-0.5, 0.0, 1e-3, 0.1, 1.0, 3.0):
        found[f"simpo {alpha}"] = simpo(beta=beta, gamma=0.5, label_smoothing=0.1, alpha=alpha)
        for name in CPO_LOSSES:
            e = 0.1 if name == "sigmoid" else 0.0
            found[f"cpo {name} {alpha}"] = cpo(beta=beta, cpo_alpha=1.0, loss_type=name, label_smoothing=e, alpha=alpha)
    found["orpo"] = orpo(beta=beta)
    for name in KTO_LOSSES:
        found[f"kto {name}"] = kto(beta=beta, desirable_weight=1.5, undesirable_weight=0.5, loss_type=name)
    return found


PREFERENCE = {torch.float32: preference_losses(beta=2.0), torch.float64: preference_losses(beta=0.05)}


@st.composite
def sequence_values(draw: st.DrawFn) -> dict[str, list[float]]:
    return {
        "logps": draw(several(logp)),
        "ref_logps": draw(several(logp)),
        "lengths": draw(several(st.sampled_from([0, 1, 2, 1000]))),
        "confidence": draw(several(st.floats(-1e4, 8))),
    }


@both_dtypes
@swept()
@given(values=sequence_values())
@example(values={"logps": [-1e4] * SIZE, "ref_logps": [0.0] * SIZE, "lengths": [1] * SIZE, "confidence": [0.0] * SIZE})
@example(
    values={"logps": [-79.9, 0.0] * (SIZE // 2), "ref_logps": [0.0] * SIZE, "lengths": [1] * SIZE, "confidence": [8.0] * SIZE}
)
@example(values={"logps": [0.0] * SIZE, "ref_logps": [0.0] * SIZE, "lengths": [0] * SIZE, "confidence": [0.0] * SIZE})
def test_preference_losses_are_finite(values, dtype):
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    leaves = {"logps": tensors["logps"].requires_grad_(), "nll_sums": (-tensors["ref_logps"]).requires_grad_()}
    unpaired = {"desirable": torch.arange(SIZE) % 2 == 0, "kl": tensors["ref_logps"].mean()}

    def evaluate(name: str) -> Results:
        loss = PREFERENCE[dtype][name]
        single = loss.group == "sequence"
        batch = (Sequences if single else Pairs)(
            **leaves,
            lengths=tensors["lengths"],
            ref_logps=tensors["ref_logps"] if loss.needs_reference else None,
            confidence=tensors["confidence"] if loss.uses_confidence else None,
            inputs=unpaired if single else {},
            totals=Totals(SIZE if single else SIZE // 2, 10),
        )
        result = loss(batch)
        rewards = {"chosen_rewards": result.chosen_rewards, "rejected_rewards": result.rejected_rewards}
        return result.losses, {**result.metrics, **{name: value for name, value in rewards.items() if value is not None}}

    assert_finite(evaluate, PREFERENCE[dtype], leaves)


# Policy losses


def policy_losses() -> dict[str, PolicyLoss]:
    found = {}
    for dual in (None, 3.0):
        for kind in KL_PENALTIES:
            found[f"ppo {dual} {kind}"] = ppo(clip_low=0.2, clip_high=0.3, dual_clip=dual, kl_coef=0.5, kl_estimator=kind)
    for name in GRPO_LOSSES:
        for level in ("token", "sequence") if name != "vespo" else ("token",):
            for correct in (True, False):
                for delta in (None, 5.0) if name in CLIPPED else (None,):
                    options = GRPOOptions(
                        loss_type=name,
                        beta=0.5,
                        epsilon_low=0.2,
                        epsilon_high=5.0 if name == "cispo" else 0.2,
                        delta=delta,
                        importance_sampling_level=level,
                        use_bias_correction_kl=correct,
                        sapo_temperature_pos=1.0,
                        sapo_temperature_neg=1.05,
                        vespo_k_pos=2.0,
                        vespo_lambda_pos=3.0,
                        vespo_k_neg=3.0,
                        vespo_lambda_neg=2.0,
                        off_policy_mask_threshold=0.5 if correct else None,
                        top_entropy_quantile=0.5 if correct else 1.0,
                    )
                    found[f"grpo {name} {level} bias correction {correct} delta {delta}"] = grpo(options)
    return found


POLICY = policy_losses()


@st.composite
def token_values(draw: st.DrawFn) -> dict[str, list[float]]:
    return {
        "logps": draw(several(logp)),
        "old_logps": draw(several(logp)),
        "ref_logps": draw(several(logp)),
        "sampling_logps": draw(several(logp)),
        "advantages": draw(several(st.sampled_from([-1e4, -1.0, 0.0, 1.0, 1e4]) | st.floats(-100, 100))),
        "entropies": draw(several(st.floats(0, 12))),
    }


def all_of(**values: float) -> dict[str, list[float]]:
    """The same at every token; advantages of 1, whatever is not given 0."""
    return {name: [values.get(name, 0.0)] * SIZE for name in ("logps", "old_logps", "ref_logps", "sampling_logps")} | {
        "advantages": [values.get("advantages", 1.0)] * SIZE,
        "entropies": [1.0] * SIZE,
    }


@both_dtypes
@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@swept()
@given(values=token_values())
@example(values=all_of(logps=-95.0))
@example(values=all_of(old_logps=-1e4, advantages=-1e4))
@example(values=all_of(logps=-160.0, old_logps=-239.0, sampling_logps=-318.0, advantages=-1.0))
@example(values=all_of(logps=-79.0, old_logps=-158.0))
def test_policy_losses_are_finite(values, corrected, dtype):
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    inputs = {"sampling_logps": tensors["sampling_logps"]}
    if corrected:  # by a ratio without a bound of its own
        given = {"mode": "token_mask", "clip_min": None, "clip_max": None}
        inputs["importance_sampling_ratio"] = ll.rl.importance_sampling_ratio(
            tensors["old_logps"], tensors["sampling_logps"], cu_seqlens=OFFSETS, **given
        ).to(dtype)
    leaves = {"logps": tensors["logps"].requires_grad_()}

    def evaluate(name: str) -> Results:
        loss = POLICY[name]
        result = loss(
            Tokens(
                **leaves,
                old_logps=tensors["old_logps"],
                advantages=tensors["advantages"],
                ref_logps=tensors["ref_logps"],
                entropies=tensors["entropies"] if loss.uses_entropy else None,
                inputs=inputs,
                offsets=OFFSETS,
                add=SEGMENT_SUM,
            )
        )
        return result.losses, result.metrics

    assert_finite(evaluate, POLICY, leaves)


@both_dtypes
@swept()
@given(values=several(st.tuples(logp, logp)))
@example(values=[(0.0, -1e4)] * SIZE)
def test_importance_sampling_ratios_are_finite(values, dtype):
    old, sampling = torch.tensor(values, dtype=dtype).T
    for mode in IMPORTANCE_SAMPLING_MODES:
        for low, high in ((None, 3.0), (0.5, None), (0.1, 5.0)):
            given = {"mode": mode, "clip_min": low, "clip_max": high}
            ratio = ll.rl.importance_sampling_ratio(old, sampling, cu_seqlens=OFFSETS, **given)
            assert ratio.isfinite().all() and (ratio >= 0).all(), (given, ratio.tolist())


# Rewards, advantages and values


@both_dtypes
@swept()
@given(values=several(st.tuples(logp, logp)))
@example(values=[(-95.0, 0.0)] * SIZE)
def test_kl_estimates_and_rewards_that_they_shape_are_finite(values, dtype):
    logps, ref_logps = torch.tensor(values, dtype=dtype).T
    leaf = logps.clone().requires_grad_()
    assert_finite(lambda name: (ll.rl.kl_estimate(leaf, ref_logps, name), {}), ll.rl.KL_ESTIMATORS, {"logps": leaf})
    rewards = torch.tensor([1.0, -1e4, 1e4], dtype=dtype)
    for name in ll.rl.KL_ESTIMATORS:
        given = {"kl_coef": 0.1, "kl_estimator": name, "reward_clip_range": (-5.0, 5.0)}
        shaped = ll.rl.kl_shaped_rewards(rewards, logps, ref_logps, cu_seqlens=OFFSETS, **given)
        found = {
            "shaped": shaped.float(),
            "advantages": ll.gae(shaped, -logps, cu_seqlens=OFFSETS, lam=1.0).advantages.float(),
            "reinforce++": ll.rl.reinforce_plus_plus_advantages(rewards, cu_seqlens=OFFSETS, token_rewards=shaped),
            "whitened": ll.rl.masked_whiten(shaped),
        }
        assert all(value.isfinite().all() for value in found.values()), (name, found)


reward = st.sampled_from([-1e4, -1.0, 0.0, 1e-30, 1.0, 1e4]) | st.floats(-1e4, 1e4)
STATISTICS = {"whiten": ll.rl.masked_whiten, "var": ll.rl.masked_var, "mean": ll.rl.masked_mean}


@both_dtypes
@swept()
@given(rewards=several(reward) | reward.map(lambda value: [value] * SIZE))
@example(rewards=[0.1] * SIZE)
@example(rewards=[1e4] * SIZE)
def test_advantages_and_statistics_are_finite(rewards, dtype):
    rewards = torch.tensor(rewards, dtype=dtype)
    of_tokens = {"cu_seqlens": torch.arange(SIZE + 1) * 2}
    found = {f"group {scale}": ll.group_advantages(rewards, group_size=4, scale_rewards=scale) for scale in ("group", "batch")}
    for normalize in (False, True):
        found[f"leave one out {normalize}"] = ll.rl.leave_one_out_advantages(rewards, group_size=4, normalize=normalize)
    found["reinforce++"] = ll.rl.reinforce_plus_plus_advantages(rewards, **of_tokens)
    found["baseline"] = ll.rl.reinforce_plus_plus_advantages(rewards, **of_tokens, baseline="group", group_size=4)
    tracker, prompts = ll.rl.ValueTracker(), [i // 3 for i in range(SIZE)]
    for step in range(2):
        found[f"tracker {step}"] = tracker.advantages(prompts, rewards, kl=rewards.abs())
    found["values"] = tracker.values(prompts)
    for name, value in found.items():
        assert value.isfinite().all(), (name, value.tolist(), rewards.tolist())
    leaf = rewards.clone().requires_grad_()
    assert_finite(lambda name: (STATISTICS[name](leaf), {}), STATISTICS, {"values": leaf})


@both_dtypes
@swept()
@given(values=several(st.tuples(reward, reward, reward)))
def test_value_and_reward_losses_are_finite(values, dtype):
    value, target, old = torch.tensor(values, dtype=dtype).T
    leaf = value.clone().requires_grad_()

    def of_values(aggregation: str) -> Results:
        plain = ll.value_loss(leaf, target, cu_seqlens=OFFSETS, aggregation=aggregation)
        clipped = ll.value_loss(leaf, target, cu_seqlens=OFFSETS, aggregation=aggregation, old_values=old, clip_range=0.2)
        return torch.stack((plain.loss, clipped.loss)), {"clip_fraction": clipped.clip_fraction}

    def of_rewards(name: str) -> Results:
        out = ll.BradleyTerryLoss(0.5 if name == "centered" else None)(leaf, margin=target[: SIZE // 2])
        return out.loss, out.metrics

    assert_finite(of_values, ("token-mean", "sequence-mean"), {"values": leaf})
    assert_finite(of_rewards, ("plain", "centered"), {"rewards": leaf})


# What happens beyond a bound


def value_and_gradient(of: Callable[[Tensor], Tensor], at: list[float]) -> tuple[Tensor, Tensor]:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = of(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def reference(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


#: A function of log-probabilities under a reference of 0, the place of its bound, and the value there.
BOUNDED: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "k3": (lambda x: ll.rl.kl_estimate(x, reference(x), "k3"), -80.0, LARGEST - 81),
    "forward_kl": (lambda x: f_divergence_score(x, "forward_kl", 0.5), -80.0, 1 - LARGEST),
    "alpha_divergence": (lambda x: f_divergence_score(x, "alpha_divergence", 0.5), -160.0, -2 * (LARGEST - 1)),
    "AlphaPO": (lambda x: alpha_reward(x, 2.0), -40.0, (1 - LARGEST) / 2),
    "square": (lambda x: bounded_square(x * 1e17, 5.0), -LARGEST_ROOT / 1e17, (LARGEST_ROOT + 5) ** 2),
    "odds": (log_odds, 0.0, math.log(1e12)),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_beyond_a_bound_the_value_is_that_of_the_bound_and_the_gradient_0(name):
    of, bound, wanted = BOUNDED[name]
    value, gradient = value_and_gradient(of, [bound * 1.01, bound * 30])
    torch.testing.assert_close(value, torch.full_like(value, wanted), rtol=1e-12, atol=0)
    assert (gradient == 0).all()
    if bound:
        _, gradient = value_and_gradient(of, [bound * 0.99])
        assert gradient.isfinite().all() and (gradient != 0).all()


def test_ratios_have_stated_bounds():
    old, sampling = torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0])
    ratios = ll.rl.importance_sampling_ratio(old[None], sampling[None], mode="token_mask", clip_max=None)
    assert ratios.tolist() == [[pytest.approx(LARGEST_ROOT, rel=1e-6), 0.0]]


# Through the modules: logits that put a target 95 or 1e4 nats below the others

PAIRED = {
    "sigmoid forward_kl": ll.FusedLinearDPOLoss(f_divergence_type="forward_kl"),
    "ipo forward_kl": ll.FusedLinearDPOLoss(loss_type="ipo", f_divergence_type="forward_kl"),
    "hinge alpha": ll.FusedLinearDPOLoss(loss_type="hinge", f_divergence_type="alpha_divergence"),
    "discopop": ll.FusedLinearDPOLoss(beta=2.0, loss_type="discopop", discopop_tau=4.0),
    "simpo alpha": ll.FusedLinearSimPOLoss(alpha=1.0),
    "cpo ipo alpha": ll.FusedLinearCPOLoss(loss_type="ipo", alpha=1.0),
    "orpo": ll.FusedLinearORPOLoss(),
}
PER_TOKEN = {
    **{f"ppo {kind}": ll.FusedLinearPPOLoss(kl_coef=0.5, kl_estimator=kind) for kind in KL_PENALTIES},
    "ppo dual": ll.FusedLinearPPOLoss(dual_clip=3.0, entropy_coef=0.1),
    "ppo rollouts": ll.FusedLinearPPOLoss(importance_sampling_mode="token_mask", importance_sampling_clip_max=None),
    **{
        f"grpo {name}": ll.FusedLinearGRPOLoss(
            loss_type=name,
            beta=0.5,
            max_completion_length=9 if name == "dr_grpo" else None,
            epsilon_high=5.0 if name == "cispo" else None,
        )
        for name in GRPO_LOSSES
    },
    "gspo": ll.FusedLinearGRPOLoss(loss_type="grpo", beta=0.5, importance_sampling_level="sequence"),
    "off policy": ll.FusedLinearGRPOLoss(beta=0.5, use_bias_correction_kl=False, off_policy_mask_threshold=0.5),
}


def improbable(dtype: torch.dtype, nats: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (4, 5, H), weight (V, H), labels (4, 5): the third target of each sequence is that far below another token."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 5, 16, generator=g), torch.randn(40, 16, generator=g)
    labels = torch.randint(40, (4, 5), generator=g)
    away = weight[(labels[:, 2] + 1) % 40] - weight[labels[:, 2]]
    hidden[:, 2] = nats * away / away.square().sum(-1, keepdim=True)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def assert_trains(name: str, loss: Tensor, hidden: Tensor, weight: Tensor) -> None:
    loss.backward()
    assert loss.isfinite(), name
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all(), name
    hidden.grad = weight.grad = None


@pytest.mark.parametrize("nats", [79.0, 95.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_modules_are_finite_where_a_token_is_improbable(dtype, nats):
    hidden, weight, labels = improbable(dtype, nats)
    low, high = torch.full((4, 5), -1e4), torch.zeros(4, 5)
    for name, module in PAIRED.items():
        for ref in (low, high):
            given = {"ref_logps": ref.sum(-1)} if isinstance(module, ll.FusedLinearDPOLoss) else {}
            assert_trains(name, module(hidden, weight, labels, **given).loss, hidden, weight)
    kto = ll.FusedLinearKTOLoss()
    for ref in (low, high):
        given = {"desirable": torch.tensor([True, False, True, False]), "ref_logps": ref.sum(-1), "kl": torch.tensor(1e4)}
        assert_trains("kto", kto(hidden, weight, labels, **given).loss, hidden, weight)
    for name, module in PER_TOKEN.items():
        for old in (low, high):
            given = {"advantages": torch.tensor([1.0, -1.0, 2.0, -2.0]), "old_logps": old}
            given |= {} if name in ("ppo dual", "ppo rollouts") else {"ref_logps": high}
            given |= {"sampling_logps": low} if name in ("ppo rollouts", "off policy") else {}
            assert_trains(name, module(hidden, weight, labels, **given).loss, hidden, weight)


def test_a_token_beyond_the_bound_leaves_the_gradients_of_the_others_as_they_are():
    hidden, weight, labels = improbable(torch.float64, 95.0)
    module = ll.FusedLinearPPOLoss(kl_coef=0.5, kl_estimator="k3")
    given = {"advantages": torch.zeros(4, 5), "ref_logps": torch.zeros(4, 5)}
    given["ref_logps"] = module(hidden, weight, labels, **given).logps.detach() + 0.1  # near the policy's
    given["ref_logps"][:, 2] = 0
    module(hidden, weight, labels, **given).loss.backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    others = labels.clone()
    others[:, 2] = -100
    module(hidden, weight, others, **given, num_items_in_batch=20).loss.backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad), rtol=1e-12, atol=1e-15)
