"""What every test runs under."""

from __future__ import annotations

import os

import pytest

# Nothing here needs the network; a hub that is asked anyway must not be waited for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def backend():
    """The whole suite runs on one backend: ``LOGITLESS_TEST_BACKEND``, or the one that ``auto`` picks."""
    import logitless as ll

    with ll.settings(backend=os.environ.get("LOGITLESS_TEST_BACKEND", "auto")):
        yield
