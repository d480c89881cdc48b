"""Policy-gradient training: PPO, the GRPO family, importance weights of rollouts, and losses of your own."""
