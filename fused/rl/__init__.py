"""Reinforcement learning on log-probabilities: advantages, KL estimates, masked statistics, value and reward-model losses."""
