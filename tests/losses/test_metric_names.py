"""The names of metrics depend on the options of a module, never on the data: trainers gather them over processes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import logitless as ll

H, V, T = 8, 23, 4
CLIPPED = ("grpo", "bnpo", "dapo", "luspo")
PPO, GRPO = ll.FusedLinearPPOLoss, ll.FusedLinearGRPOLoss


def own_pair(pairs: ll.Pairs) -> ll.PreferenceLossResult:
    margin = pairs.chosen_logps - pairs.rejected_logps
    return ll.PreferenceLossResult(-margin, metrics={"margin": margin})


def own_sequence(sequences: ll.Sequences) -> ll.PreferenceLossResult:
    return ll.PreferenceLossResult(-sequences.logps, metrics={"length": sequences.lengths})


def own_tokens(tokens: ll.Tokens) -> ll.PolicyLossResult:
    return ll.PolicyLossResult(-tokens.logps * tokens.advantages, {"moved": tokens.logps - tokens.old_logps})


PREFERENCE = {
    "dpo": ll.FusedLinearDPOLoss(metrics=True),
    "dpo mix": ll.FusedLinearDPOLoss(loss_type=["sigmoid", "apo_zero", "sft"], metrics=True),
    "dpo ld": ll.FusedLinearDPOLoss(ld_alpha=0.5, metrics=True),
    "wpo": ll.FusedLinearDPOLoss(use_weighting=True, metrics=True),
    "wpo with sft": ll.FusedLinearDPOLoss(loss_type=["sigmoid", "sft"], use_weighting=True, metrics=True),
    "aot": ll.FusedLinearDPOLoss(loss_type="aot", metrics=True),
    "ipo": ll.FusedLinearIPOLoss(metrics=True),
    "simpo": ll.FusedLinearSimPOLoss(metrics=True),
    "alphapo": ll.FusedLinearSimPOLoss(alpha=0.2, metrics=True),
    "cpo": ll.FusedLinearCPOLoss(metrics=True),
    "cpo without nll": ll.FusedLinearCPOLoss(cpo_alpha=0.0, loss_type="hinge", metrics=True),
    "orpo": ll.FusedLinearORPOLoss(metrics=True),
    "kto": ll.FusedLinearKTOLoss(metrics=True),
    "apo zero unpaired": ll.FusedLinearKTOLoss(loss_type="apo_zero_unpaired", metrics=True),
    "own pair": ll.FusedLinearPreferenceLoss(own_pair, metrics=True),
    "own sequence": ll.FusedLinearPreferenceLoss(own_sequence, group="sequence", metrics=True),
    "own batch": ll.FusedLinearPreferenceLoss(own_pair, group="batch", metrics=True),
}
POLICY = {
    "ppo": PPO(),
    "ppo everything": PPO(dual_clip=3.0, kl_coef=0.1, entropy_coef=0.02, metrics=True),
    "ppo corrected": PPO(importance_sampling_mode="sequence_mask"),
    **{name: GRPO(name) for name in CLIPPED},
    "dr_grpo": GRPO("dr_grpo", max_completion_length=5),
    "gspo": GRPO("grpo", importance_sampling_level="sequence", beta=0.1, metrics=True),
    "cispo": GRPO("cispo", epsilon_high=5.0),
    "sapo": GRPO("sapo", entropy_coef=0.1),
    "vespo": GRPO("vespo", importance_sampling_mode="token_mask"),
    "off policy": GRPO("dapo", off_policy_mask_threshold=0.05),
    "top entropy": GRPO("dapo", top_entropy_quantile=0.4, entropy_coef=0.1),
    "own tokens": ll.FusedLinearPolicyLoss(own_tokens, metrics=True),
    "own sequences": ll.FusedLinearPolicyLoss(own_tokens, group="sequence"),
}


@dataclass(frozen=True)
class Data:
    """Scored tokens of each sequence, whether each is desirable, and the advantage of each. An even number of sequences."""

    lengths: list[int]
    desirable: list[bool]
    advantages: list[float]

    @property
    def labels(self) -> Tensor:
        where = torch.arange(T) < torch.tensor(self.lengths, dtype=torch.long)[:, None]
        return torch.where(where, torch.arange(T), -100)

    def run(self, name: str) -> Any:
        """The module's output on this data, packed."""
        count, labels = len(self.lengths), self.labels
        g = torch.Generator().manual_seed(0)
        x, w = torch.randn(count * T, H, generator=g, requires_grad=True), torch.randn(V, H, generator=g, requires_grad=True)
        module: Callable[..., Any] = PREFERENCE[name] if name in PREFERENCE else POLICY[name]
        given: dict[str, Any] = {"cu_seqlens": torch.arange(count + 1) * T}
        if isinstance(module, ll.FusedLinearPreferenceLoss):
            if module.loss.needs_reference:
                given["ref_logps"] = torch.zeros(count)
            if isinstance(module, ll.FusedLinearKTOLoss):
                given |= {"desirable": torch.tensor(self.desirable, dtype=torch.bool)}
                given["kl"] = 0.1 if module.loss_type == "kto" else None
        else:
            old = torch.full((count * T,), -3.0)
            given |= {"advantages": torch.tensor(self.advantages), "old_logps": old}
            if module.loss.needs_reference:
                given["ref_logps"] = old
            if module.importance_sampling_mode is not None or "sampling_logps" in module.loss.reads:
                given["sampling_logps"] = old
        out = module(x, w, labels.flatten(), **given)
        out.loss.backward()
        assert x.grad is not None and w.grad is not None
        assert x.grad.isfinite().all() and w.grad.isfinite().all()
        return out


def data(lengths: list[int], desirable: bool | list[bool] = True) -> Data:
    flags = desirable if isinstance(desirable, list) else [desirable] * len(lengths)
    return Data(lengths, flags, [1.0 - 2 * (i % 2) for i in range(len(lengths))])


ORDINARY = data([4, 3, 2, 1], [True, False, True, False])
#: What makes a batch special, one by one.
SPECIAL = {
    "no sequences": data([]),
    "every position ignored": data([0, 0, 0, 0]),
    "one token": data([1, 0]),
    "nothing chosen is scored": data([0, 0, 3, 4]),
    "nothing rejected is scored": data([3, 4, 0, 0]),
    "one class": data([4, 3, 2, 1], True),
    "the other class": data([4, 3, 2, 1], False),
    "one class without tokens": data([0, 0], True),
    "one pair": data([3, 3], [True, False]),
}
EVERY = [*PREFERENCE, *POLICY]
every_module = pytest.mark.parametrize("name", EVERY)


@every_module
@pytest.mark.parametrize("special", SPECIAL)
def test_names_are_those_of_any_other_batch(name, special):
    out, ordinary = SPECIAL[special].run(name), ORDINARY.run(name)
    assert list(out.metrics) == list(ordinary.metrics)
    assert ordinary.metrics
    for key, value in out.metrics.items():
        assert value.shape == ()
        assert value.dtype == ordinary.metrics[key].dtype
        assert value.isfinite(), key


@st.composite
def batches(draw: st.DrawFn) -> Data:
    count = 2 * draw(st.integers(0, 3))
    each = st.integers(0, T)
    return Data(
        draw(st.lists(each, min_size=count, max_size=count)),
        draw(st.lists(st.booleans(), min_size=count, max_size=count)),
        draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=count, max_size=count)),
    )


@every_module
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(batch=batches())
def test_names_do_not_depend_on_random_data(name, batch):
    out = batch.run(name)
    assert list(out.metrics) == list(ORDINARY.run(name).metrics)
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("name", ["kto", "apo zero unpaired"])
@pytest.mark.parametrize("desirable", [True, False])
def test_metrics_of_an_absent_class_are_0(name, desirable):
    out = data([4, 3, 2, 1], desirable).run(name)
    present, absent = ("chosen", "rejected") if desirable else ("rejected", "chosen")
    for key in ("rewards", "logps", "logits"):
        assert out.metrics[f"{key}/{absent}"] == 0
        assert out.metrics[f"{key}/{present}"] != 0
    assert out.metrics["rewards/margins"] == 0
    assert out.metrics[f"rewards/{present}"].item() == pytest.approx(out.rewards.mean().item(), rel=1e-6)


@every_module
def test_metrics_of_nothing_are_0(name):
    for special in ("no sequences", "every position ignored"):
        out = SPECIAL[special].run(name)
        others = {"kl"} if name in PREFERENCE else set()  # the KL estimate of the caller
        if special == "every position ignored":
            others |= {"log_odds_ratio"}  # of equal odds: -ln 2
        assert all(value == 0 for key, value in out.metrics.items() if key not in others)
