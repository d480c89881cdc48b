"""The value tracker of single-stream policy optimisation as a Beta distribution that forgets."""

from __future__ import annotations

import pytest
import torch

from logitless.fused.rl.value_tracker import ValueTracker

from .tokens import F64, NAN


def beta_tracker(start, batches, half_life, low, high):
    """SPO's tracker in its own terms, one prompt: Beta parameters. Yields baselines."""
    n = 1 / (1 - low)
    alpha, beta = n * start, n * (1 - start)
    for reward, kl in batches:
        yield alpha / (alpha + beta), alpha + beta
        rho = min(high, max(low, 2 ** (-kl / half_life)))
        alpha, beta = rho * alpha + reward, rho * beta + 1 - reward


def test_the_value_tracker_is_a_beta_distribution_that_forgets():
    batches = [(1.0, 0.0), (0.0, 0.01), (1.0, 0.006), (1.0, 1.0), (0.25, 0.004), (0.0, 0.05)]
    tracker = ValueTracker(half_life=0.06)
    tracker.initialize(["a"], torch.tensor([0.25]))
    for (reward, kl), (value, count) in zip(batches, beta_tracker(0.25, batches, 0.06, 0.875, 0.96), strict=True):
        assert float(tracker.values(["a"])) == pytest.approx(value, rel=1e-6)
        assert float(tracker.counts(["a"])) == pytest.approx(count, rel=1e-6)
        rewards, divergence = torch.tensor([reward], dtype=F64), torch.tensor([kl], dtype=F64)
        got = tracker.advantages(["a"], rewards, kl=divergence, whiten=False)
        assert float(got) == pytest.approx(reward - value, abs=1e-12)


def test_the_value_tracker_whitens_over_the_batch_with_values_from_before_it():
    tracker = ValueTracker()
    tracker.initialize(["a", "b"], torch.tensor([0.9, 0.1], dtype=F64))
    rewards = torch.tensor([1.0, 1.0, NAN, 0.0], dtype=F64)
    got = tracker.advantages(["a", "b", "a", "c"], rewards)
    raw = torch.tensor([0.1, 0.9, -0.5], dtype=F64)
    torch.testing.assert_close(got[[0, 1, 3]], (raw - raw.mean()) / (raw.var() + 1e-8).sqrt(), rtol=1e-12, atol=1e-12)
    assert got[2] == 0 and "c" in tracker and len(tracker) == 3
    assert float(tracker.counts(["a"])) == pytest.approx(0.96 * 8 + 1)  # not that of the sequence without a score


def test_the_value_tracker_counts_a_prompt_once_for_each_sequence_in_any_order():
    rewards, kl = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.02, 0.01])
    trackers = [ValueTracker(half_life=0.1), ValueTracker(half_life=0.1)]
    trackers[0].advantages([7, 7, 7], rewards, kl=kl)
    trackers[1].advantages(torch.tensor([7, 7, 7]), rewards.flip(0), kl=kl.flip(0))
    rho = 2**-0.1
    for tracker in trackers:
        assert float(tracker.values([7])) == pytest.approx((rho * 8 * 0.5 + 2) / (rho * 8 + 3), rel=1e-6)
        assert float(tracker.counts([7])) == pytest.approx(rho * 8 + 3, rel=1e-6)


def test_the_value_tracker_can_be_saved_and_left_as_it_is(tmp_path):
    tracker = ValueTracker()
    keys, rewards = ["a", 3, ("b", 1)], torch.tensor([1.0, 0.0, 0.5])
    tracker.advantages(keys, rewards)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    other = ValueTracker()
    other.advantages(["gone"], torch.tensor([1.0]), whiten=False)
    other.load_state_dict(torch.load(tmp_path / "tracker.pt"))
    assert "gone" not in other and len(other) == 3
    assert torch.equal(other.advantages(keys, rewards, update=False), tracker.advantages(keys, rewards, update=False))
    assert torch.equal(other.advantages(keys, rewards), tracker.advantages(keys, rewards))
    assert torch.equal(other.values(keys), tracker.values(keys))
    assert torch.equal(other.counts(keys), tracker.counts(keys))


def test_bad_input_of_the_value_tracker():
    for changes, message in (
        ({"half_life": 0}, "half_life must be a finite number"),
        ({"rho_min": -0.1}, "rho_min must be a finite number"),
        ({"rho_min": 1, "rho_max": 1}, "rho_min must be below 1"),
        ({"rho_max": 0.5}, "rho_max must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            ValueTracker(**changes)
    tracker, two = ValueTracker(), torch.zeros(2)
    for arguments, options, error, message in (
        (("ab", two), {}, TypeError, "keys must be a sequence of hashable keys"),
        ((torch.zeros(2), two), {}, TypeError, "keys must be a sequence, or a tensor of integers"),
        ((["a"], two), {}, ValueError, r"rewards must have shape \[1\]"),
        ((["a"], torch.zeros(1)), {}, ValueError, "rewards must hold at least 2 values that are not NaN"),
        ((["a", "b"], two), {"kl": torch.tensor([0.0, -1.0])}, ValueError, "kl must not be negative or NaN"),
        ((["a", "b"], two), {"kl": two, "update": False}, ValueError, "kl is given, but update=False"),
        ((["a", "b"], two), {"kl": torch.zeros(3)}, ValueError, r"kl must have shape \[2\]"),
    ):
        with pytest.raises(error, match=message):
            tracker.advantages(*arguments, **options)
    assert len(tracker) == 0
    with pytest.raises(ValueError, match="values must be a finite number"):
        tracker.initialize(["a"], torch.tensor([NAN]))
    with pytest.raises(ValueError, match="state_dict must have exactly keys, values and counts, got"):
        tracker.load_state_dict({"keys": []})


def test_keys_that_are_tensors_are_told_apart_by_their_values():
    tracker = ValueTracker()
    for _ in range(3):
        tracker.advantages([torch.tensor(7), torch.tensor(9)], torch.tensor([1.0, 0.0]))
    assert len(tracker) == 2 and 7 in tracker
    with pytest.raises(TypeError, match="hashable by value"):
        tracker.advantages([torch.ones(2), torch.ones(2)], torch.tensor([1.0, 0.0]))
