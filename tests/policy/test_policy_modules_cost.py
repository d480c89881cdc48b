"""What the policy-loss modules cost: FLOP and bytes, counted by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll

from ..core.test_cost import budget_for_rows, flops, inputs, peak_bytes, scored
from .cases import GRPO, LOSSES, PPO, WITH_ENTROPY, every_loss

EVERY_BACKEND = True


H, V = 32, 4096


def cost_arguments(name: str, labels: Tensor, reference: bool = True) -> dict[str, Any]:
    given = {"advantages": torch.linspace(-1, 1, len(labels)), "old_logps": torch.full(labels.shape, -8.0)}
    if LOSSES[name].loss.needs_reference and reference:
        given["ref_logps"] = given["old_logps"]
    if LOSSES[name].importance_sampling_mode is not None:
        given["sampling_logps"] = given["old_logps"]
    return given


def step(name: str, train: str, labels: Tensor, x: Tensor, w: Tensor, given: dict[str, Any]) -> Any:
    out = LOSSES[name](x, w, labels, **given)
    if train:
        out.loss.backward()
    return out


@every_loss
@pytest.mark.parametrize(("train", "limit"), [("hw", 6.02), ("h", 4.02), ("w", 4.02), ("", 2.01)])
def test_every_loss_needs_6_4_or_2_on_scored_tokens(name, train, limit):
    x, w, labels = inputs(train)
    given = cost_arguments(name, labels)
    counted = flops(lambda: step(name, train, labels, x, w, given))
    assert 0 < counted <= limit * scored(labels) * H * V


@pytest.mark.parametrize("name", ["ppo", "ppo everything", "dapo", "cispo"])
@pytest.mark.parametrize(("train", "limit"), [("hw", 6.02), ("h", 4.02)])
def test_token_losses_need_no_more_however_small_the_budget(name, train, limit):
    x, w, labels = inputs(train)
    plans = []
    with ll.settings(memory_budget=budget_for_rows(7)):
        counted = flops(lambda: plans.append(step(name, train, labels, x, w, cost_arguments(name, labels)).plan))
    assert counted <= limit * scored(labels) * H * V
    assert plans[0].flops == pytest.approx(counted, rel=0.01)
    if "w" in train or name in WITH_ENTROPY:
        assert len(plans[0].steps) > 5


@pytest.mark.parametrize("name", ["gspo", "own", "top entropy"])
def test_sequences_larger_than_the_budget_pay_8(name):
    x, w, labels = inputs("hw")
    with ll.settings(memory_budget=budget_for_rows(5)):
        counted = flops(lambda: step(name, "hw", labels, x, w, cost_arguments(name, labels)))
        out = step(name, "", labels, x, w, cost_arguments(name, labels))
    assert counted == 8 * scored(labels) * H * V == out.plan.flops
    assert out.plan.schedule == "recompute"


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_a_known_entropy_threshold_saves_the_second_pass(coef):
    """But not where the entropy bonus is a mean over tokens that only the end of the pass counts."""
    x, w, labels = inputs("hw")
    loss = GRPO("dapo", top_entropy_quantile=0.4, entropy_coef=coef)
    with ll.settings(memory_budget=budget_for_rows(5)):
        counted = flops(lambda: loss(x, w, labels, advantages=torch.linspace(-1, 1, 4), entropy_threshold=7.5).loss.backward())
    assert counted == (8 if coef else 6) * scored(labels) * H * V


@pytest.mark.parametrize("name", ["ppo everything", "grpo", "gspo bonus"])
@pytest.mark.parametrize(("train", "passes"), [("hw", 6), ("h", 4), ("", 2)])
def test_reference_hidden_states_cost_one_forward_pass(name, train, passes):
    x, w, labels = inputs(train)
    given = {**cost_arguments(name, labels, reference=False), "ref_hidden": x.detach(), "ref_weight": w.detach()}
    counted = flops(lambda: step(name, train, labels, x, w, given))
    assert counted == (passes + 2) * scored(labels) * H * V


@pytest.mark.parametrize("train", ["hw", "h"])
def test_entropy_for_metrics_costs_no_gemm(train):
    x, w, labels = inputs(train)
    for loss in (PPO(metrics=True), GRPO("vespo", metrics=True)):
        counted = flops(lambda loss=loss: loss(x, w, labels, advantages=torch.ones(4)).loss.backward())
        assert counted == (6 if train == "hw" else 4) * scored(labels) * H * V


@pytest.mark.parametrize(("train", "passes"), [("hw", 6), ("h", 4), ("w", 4), ("", 2)])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_plan_of_a_token_loss(train, passes, entropy):
    plan = ll.plan(
        num_tokens=4096,
        hidden_size=1024,
        vocab_size=65536,
        token_groups=True,
        entropy_gradient=entropy,
        train_hidden="h" in train,
        train_weight="w" in train,
        memory_budget=64 << 20,
    )
    assert plan.passes == passes
    expected = {"": "forward_only", "h": "gradient_in_forward" if entropy else "deferred_scale"}
    assert plan.schedule == expected.get(train, "gradient_in_forward")
    assert plan.steps[0].start == 0
    assert plan.steps[-1].stop == 4096
    assert all(a.stop == b.start for a, b in zip(plan.steps, plan.steps[1:]))
    sizes = [s.num_tokens for s in plan.steps]
    assert max(sizes) - min(sizes) <= 128 * len(sizes)
    assert plan.options.slopes_later == entropy
    assert ("entropy" in plan.options.outputs) == entropy
    if plan.schedule == "gradient_in_forward":
        assert len(sizes) > 1
        assert "tokens are independent" in str(plan)


@pytest.mark.parametrize("other", [{"group_sizes": [5, 5]}, {"arbitrary_loss": True}])
def test_token_groups_go_without_other_groups(other):
    with pytest.raises(ValueError, match="token_groups"):
        ll.plan(num_tokens=10, hidden_size=8, vocab_size=64, token_groups=True, **other)


VOCAB, HIDDEN, BUDGET = 49_152, 8, 6 << 20


@pytest.mark.parametrize(
    ("name", "train", "dtype"),
    [
        ("ppo", "hw", torch.bfloat16),
        ("ppo", "", torch.float32),
        ("ppo everything", "hw", torch.bfloat16),
        ("ppo everything", "h", torch.bfloat16),
        ("ppo everything", "hw", torch.float32),
        ("gspo bonus", "hw", torch.float16),
        ("own", "h", torch.float32),
    ],
    ids=str,
)
def test_extra_memory_stays_within_the_plan(name, train, dtype):
    """Logits of all 400 scored tokens would be 39 MB in bfloat16, and several times that with what follows them."""
    x, w, labels = inputs(train, 150, HIDDEN, VOCAB, dtype, masked=50)
    given = cost_arguments(name, labels)
    plans: list[ll.Plan] = []
    with ll.settings(memory_budget=BUDGET):
        step(name, train, labels[:, :55], x[:, :55], w, cost_arguments(name, labels[:, :55]))  # what lives for ever
        x.grad = w.grad = None
        measured = peak_bytes(lambda: plans.append(step(name, train, labels, x, w, given).plan))
    assert measured <= plans[0].extra_bytes + x.numel() * 2 * dtype.itemsize
    assert plans[0].extra_bytes < scored(labels) * VOCAB * dtype.itemsize / 2
