"""Losses on log-probabilities: the engine with its schedules, the loss functions, and the modules that users call.

This folder is the package ``logitless.fused``. Device code is in ``kernels/``.
"""
