"""Benchmarks of the head (``python -m logitless.bench``) and of whole training steps (``python -m logitless.bench.training``).

``core`` holds what both share, ``providers`` what is compared, ``losses`` the formulas in plain torch, ``suites`` the cases.
This folder is the package ``logitless.bench``; ``--list`` names every suite and provider.
"""
