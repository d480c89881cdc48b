"""Losses on the log-prob core: the engine and its schedules, the losses as pure functions, and the modules users hold.

This folder is the package ``logitless.fused``. It knows no device code; ``kernels/`` has that.
"""
