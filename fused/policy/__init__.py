"""Policy-gradient training: advantages, KL estimates, value and reward-model losses, all on small tensors."""
