"""The policy losses that the tests of the modules run, their inputs and measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.fused.policy.base import PolicyOutput

from ..core.test_cost import scored
from ..helpers import Case, make_case, relative_error, run_reference

GRPO, PPO = ll.FusedLinearGRPOLoss, ll.FusedLinearPPOLoss
LOSSES: dict[str, ll.FusedLinearPolicyLoss] = {
    "ppo": PPO(),
    "ppo everything": PPO(dual_clip=3.0, kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.02, aggregation="sequence-mean"),
    "ppo rollouts": PPO(importance_sampling_mode="sequence_truncate", importance_sampling_clip_max=2.0),
    "grpo": GRPO("grpo", beta=0.1),
    "dapo": GRPO("dapo", epsilon_high=0.28, entropy_coef=0.02),
    "dr_grpo": GRPO("dr_grpo", max_completion_length=20),
    "gspo": GRPO("grpo", importance_sampling_level="sequence"),
    "gspo bonus": GRPO("dapo", importance_sampling_level="sequence", entropy_coef=0.02, beta=0.1),
    "luspo": GRPO("luspo", importance_sampling_level="sequence"),
    "cispo": GRPO("cispo", epsilon_high=1.2),
    "sapo": GRPO("sapo"),
    "vespo": GRPO("vespo", importance_sampling_mode="token_mask"),
    "off policy": GRPO("dapo", off_policy_mask_threshold=0.05),
    "top entropy": GRPO("dapo", top_entropy_quantile=0.4, beta=0.1),
    "top entropy bonus": GRPO("dapo", top_entropy_quantile=0.4, entropy_coef=0.1),
    "own": ll.FusedLinearPolicyLoss(
        lambda t: t.to_tokens(t.sequence_mean(t.entropies).square()) - t.logps * t.advantages,
        group="sequence",
        entropy_gradient=True,
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
#: Those whose tokens wait for others of their sequence, or of the batch.
OF_SEQUENCES = ("gspo", "gspo bonus", "luspo", "vespo", "off policy", "own")
OF_BATCHES = ("top entropy", "top entropy bonus")
WITH_ENTROPY = ("ppo everything", "dapo", "gspo bonus", "top entropy bonus", "own")
BUDGETS = {"one tile": 1 << 30, "small tiles": 22_000, "one token a tile": 1}
every_budget = pytest.mark.parametrize("budget", BUDGETS)
#: What may be given for each token, whether a loss uses it or not.
OF_TOKENS = ("advantages", "old_logps", "ref_logps", "sampling_logps")


def extras(name: str, case: Case, reference: bool = True) -> dict[str, Any]:
    """What the loss needs besides the tensors of every call. Ratios are some tenths of a nat away from 1."""
    loss, g = LOSSES[name], torch.Generator().manual_seed(9)
    with torch.no_grad():
        logps = run_reference(case.double()).logps

    def near(scale: float) -> Tensor:
        return logps + scale * torch.randn(logps.shape, generator=g, dtype=torch.float64)

    given: dict[str, Any] = {"advantages": torch.linspace(-1.2, 1.4, len(logps), dtype=torch.float64), "old_logps": near(0.4)}
    if loss.loss.needs_reference and reference:
        given["ref_logps"] = near(0.5)
    if loss.importance_sampling_mode is not None or name == "off policy":
        given["sampling_logps"] = given["old_logps"] + 0.2 * torch.randn(logps.shape, generator=g, dtype=torch.float64)
    return given


def run(name: str, case: Case, given: dict[str, Any] | None = None, **changed: Any) -> PolicyOutput:
    given = {**(extras(name, case) if given is None else given), **changed}
    return LOSSES[name](case.hidden, case.weight, case.labels, case.bias, case.head, **given)


def gradient(out: PolicyOutput, case: Case, scale: float = 1.0, retain: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(out.loss * scale, case.leaves, retain_graph=retain))


def ragged(**options: Any) -> Case:
    """Six sequences of 9, 4, 0, 7, 1 and 9 tokens, with holes."""
    case = make_case(sequences=6, tokens=9, dtype=torch.float64, masked=0.15, bias=True, **options)
    for s, length in enumerate((9, 4, 0, 7, 1, 9)):
        case.labels[s, length:] = -100
    case.labels[4, 0] = 3
    return case


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-11) -> None:
    for x, y in zip(a, b, strict=True):
        assert relative_error(x, y) <= tolerance


def counted(name: str, labels: Tensor) -> int:
    return scored(labels) if LOSSES[name].aggregation == "token-mean" else len(labels)


def stats_of(case: Case) -> tuple[Tensor, Tensor]:
    stats = run_reference(case)
    assert stats.logps is not None
    assert stats.entropy is not None
    return stats.logps, stats.entropy
