"""Benchmarks: what to run (cases), who runs it (providers), checks and timings (runner), tables and files (report).

This folder is the package ``logitless.bench``; ``python -m logitless.bench --list`` says what is in it.
"""


def register_all() -> None:
    """Import every module of providers; each registers its own."""
    from . import providers, providers_peers, providers_policy, providers_tile  # noqa: F401
