"""What every test runs under."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Nothing here needs the network; a hub that is asked anyway must not be waited for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def backends() -> list[str]:
    """Every backend that runs on this machine's CPU: ``LOGITLESS_TEST_BACKEND`` alone, if set."""
    from logitless.kernels.backends import available_backends

    if one := os.environ.get("LOGITLESS_TEST_BACKEND"):
        return [one]
    return [name for name, reasons in available_backends().items() if not reasons and name in ("cpu", "torch")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with ``EVERY_BACKEND = True`` runs once on each backend, others on the one that ``auto`` picks."""
    if getattr(metafunc.module, "EVERY_BACKEND", False):
        metafunc.parametrize("backend", backends(), indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    import logitless as ll

    name = getattr(request, "param", os.environ.get("LOGITLESS_TEST_BACKEND", "auto"))
    with ll.settings(backend=name):
        yield name
