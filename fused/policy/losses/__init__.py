"""Policy losses as pure functions of :class:`~logitless.fused.policy.loss.Tokens`, one file per family."""
