"""What every test runs under.

``LOGITLESS_TEST_DEVICE=cuda`` runs tests that were written for a CPU on a GPU (``make test-gpu`` says which): it becomes
torch's default device before a test module is imported, and so that of every tensor which names none. Random numbers of a
CPU generator are drawn on the CPU and moved, so that both devices see the same inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

# Triton decides when it is first imported, and others import it: so here, and not in tests/triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Nothing here needs the network; a hub that is asked anyway must not be waited for.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEVICE = os.environ.get("LOGITLESS_TEST_DEVICE", "")
#: What LOGITLESS_TEST_BACKEND and the parameters of the modules with EVERY_BACKEND choose from.
_CANDIDATES = ("torch", "cuda", "triton") if DEVICE.startswith("cuda") else ("cpu", "torch")


def _drawn_on_the_cpu(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``draw``, also with a CPU's generator where the default device is another."""

    @functools.wraps(draw)
    def drawn(*args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> torch.Tensor:
        if generator is None or kwargs.get("device") is not None:
            return draw(*args, generator=generator, **kwargs)
        return draw(*args, generator=generator, device="cpu", **kwargs).to(DEVICE)

    return drawn


def _without_hypothesis() -> None:
    """Its tests are skipped where it is not installed, and the others of their modules run."""

    class Anything(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # inspect looks for a file's name
                raise AttributeError(name)
            return lambda *args, **kwargs: None

    def keep(test: Any) -> Any:
        return test

    hypothesis: Any = Anything("hypothesis")
    hypothesis.__path__ = []
    hypothesis.HealthCheck = ()
    hypothesis.strategies = Anything("hypothesis.strategies")
    hypothesis.settings = hypothesis.example = lambda *args, **kwargs: keep
    hypothesis.given = lambda *args, **kwargs: pytest.mark.skip(reason="needs hypothesis")
    sys.modules.update({"hypothesis": hypothesis, "hypothesis.strategies": hypothesis.strategies})


if importlib.util.find_spec("hypothesis") is None:
    _without_hypothesis()
if DEVICE:
    torch.set_default_device(DEVICE)
    for _name in ("rand", "randint", "randn", "randperm"):
        setattr(torch, _name, _drawn_on_the_cpu(getattr(torch, _name)))


def backends() -> list[str]:
    """Every backend that runs on the tests' device: ``LOGITLESS_TEST_BACKEND`` alone, if set."""
    from logitless.kernels.backends.registry import available_backends

    if one := os.environ.get("LOGITLESS_TEST_BACKEND"):
        return [one]
    return [name for name, reasons in available_backends().items() if not reasons and name in _CANDIDATES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module with ``EVERY_BACKEND = True`` runs once on each backend, others on the one that ``auto`` picks."""
    if getattr(metafunc.module, "EVERY_BACKEND", False):
        metafunc.parametrize("backend", backends(), indirect=True, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if DEVICE else ():
        for marker in item.iter_markers("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))


@pytest.fixture(autouse=True)
def _return_gpu_memory() -> Iterator[None]:
    """A large test must not keep what the tests of other processes need."""
    yield
    if DEVICE.startswith("cuda") and torch.cuda.memory_reserved() > 2 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    import logitless as ll

    name = getattr(request, "param", os.environ.get("LOGITLESS_TEST_BACKEND", "auto"))
    with ll.settings(backend=name):
        yield name
