"""The planner is a pure function of shapes: schedules, FLOP, bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitless as ll
from logitless.kernels.core.blocking import block_shape

SHAPE = {"num_tokens": 1000, "hidden_size": 64, "vocab_size": 10_000}
MIB = 1 << 20


@pytest.mark.parametrize(
    ("arguments", "schedule", "passes"),
    [
        ({"train_hidden": False, "train_weight": False}, "forward_only", 2),
        ({"train_weight": False}, "deferred_scale", 4),
        ({"train_weight": False, "arbitrary_loss": True}, "deferred_scale", 4),
        ({"arbitrary_loss": True}, "recompute", 8),
        ({}, "gradient_in_forward", 6),
        ({"train_hidden": False}, "gradient_in_forward", 4),
        ({"memory_budget": 5 * MIB}, "recompute", 8),
        ({"memory_budget": 5 * MIB, "margin": True}, "deferred_scale", 6),
        ({"memory_budget": 5 * MIB, "group_sizes": [100] * 10}, "gradient_in_forward", 6),
    ],
)
def test_the_schedule_with_the_fewest_flop(arguments, schedule, passes):
    plan = ll.plan(**(SHAPE | arguments))
    assert plan.schedule == schedule
    assert plan.passes == passes
    assert plan.flops == passes * 1000 * 64 * 10_000
    assert schedule in str(plan)
    assert plan.reason in str(plan)


def test_one_large_tile_replaces_many_small_ones_and_their_accumulator():
    """N * V * 2 bytes of tile against 4 * V * H of accumulator: one tile is cheaper while N <= 2 * H."""
    shape = {"hidden_size": 1024, "vocab_size": 50_000, "memory_budget": 32 * MIB}
    small = ll.plan(num_tokens=2000, group_sizes=[100] * 20, **shape)
    large = ll.plan(num_tokens=4000, group_sizes=[100] * 40, **shape)
    assert len(small.steps) == 1
    assert not small.accumulate
    assert len(large.steps) > 1
    assert large.accumulate


def test_only_groups_too_large_for_a_tile_are_recomputed():
    plan = ll.plan(num_tokens=1000, hidden_size=8, vocab_size=10_000, group_sizes=[600, 100, 200, 100], memory_budget=8 * MIB)
    assert [s.schedule for s in plan.steps] == ["recompute", *["gradient_in_forward"] * (len(plan.steps) - 1)]
    assert plan.steps[0].num_tokens == 600
    assert plan.passes == pytest.approx(6 + 2 * 0.6)
    assert plan.schedule == "mixed"


def test_on_a_cpu_the_fewest_flop_win_however_small_the_tiles_are():
    """On a GPU predicted time counts: tests/core/test_cost_model.py."""
    plan = ll.plan(num_tokens=4096, hidden_size=1024, vocab_size=150_000, group_sizes=[16] * 256, memory_budget=48 * MIB)
    assert len(plan.steps) > 30
    assert plan.passes == 6


def test_fp16_weights_keep_a_float32_gradient_for_the_loss_scale():
    assert ll.plan(**SHAPE, dtype=torch.float16).accumulate
    assert not ll.plan(**SHAPE, dtype=torch.bfloat16).accumulate


@given(
    groups=st.lists(st.integers(0, 300), max_size=12),
    vocab=st.integers(1, 20_000),
    budget=st.integers(1, 1 << 24),
    margin=st.booleans(),
)
def test_steps_cover_every_group_and_token_once(groups, vocab, budget, margin):
    n = sum(groups)
    plan = ll.plan(num_tokens=n, hidden_size=16, vocab_size=vocab, group_sizes=groups, memory_budget=budget, margin=margin)
    tokens = sorted((s.start, s.stop) for s in plan.steps)
    assert tokens[0][0] == 0
    assert tokens[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(tokens, tokens[1:]))
    counted = [g for s in plan.steps for g in range(s.first_group, s.last_group)]
    assert sorted(counted) == list(range(len(groups)))
    ordered = sorted(groups, reverse=True)
    for s in plan.steps:
        assert s.num_tokens == sum(ordered[s.first_group : s.last_group])
    assert 6 <= plan.passes <= 8


@given(
    n=st.integers(0, 10_000), vocab=st.integers(1, 300_000), size=st.sampled_from([2, 4, 8]), workspace=st.integers(1, 1 << 26)
)
def test_blocks_fit_their_workspace(n, vocab, size, workspace):
    rows, width = block_shape(n, vocab, size, workspace)
    assert 1 <= rows <= max(1, n)
    assert 1 <= width <= vocab
    assert rows == 1 or rows * width * size <= workspace


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_tokens": -1}, "num_tokens must be a positive integer, got -1"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": 1.5}, "hidden_size must be a positive integer, got 1.5"),
        ({"group_sizes": [1, 2]}, "group_sizes must be >= 0 and add up to num_tokens=1000, got a sum of 3"),
        ({"memory_budget": 0}, "memory_budget must be"),
        ({"precision": "half"}, "precision must be one of"),
        ({"outputs": ["perplexity"]}, "outputs must be a non-empty subset"),
        ({"outputs": 3}, "outputs must be a non-empty subset"),
        ({"dtype": torch.int32}, "dtype must be one of"),
        ({"weight_dtype": "bfloat16"}, "weight_dtype must be one of"),
        ({"group_sizes": [500.0, 500.0]}, "group_sizes must be integers"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ll.plan(**(SHAPE | arguments))


def test_outputs_may_be_any_collection():
    assert ll.plan(**SHAPE, outputs=["logps", "entropy"]).options.outputs == {"entropy"}
    assert ll.plan(**SHAPE).options.outputs == frozenset()
