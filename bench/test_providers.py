"""The benchmark's providers under pytest-benchmark: tiny shapes, or with ``--benchmark-enable`` those of the suites."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import providers  # noqa: F401 (registers them)
from .core.inputs import make_inputs
from .core.reference import check, compute_reference
from .core.registry import PROVIDERS
from .suites import SUITES

_TINY = {"pairs": 1, "tokens": 8, "hidden": 16, "vocab": 97}
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Compiling takes seconds; once is enough for a smoke test.
_SLOW = {"torch-compile": "op"}


def _params() -> list[tuple[str, int, str]]:
    """Suite, index of its case, provider."""
    return [
        (name, i, provider)
        for name, suite in SUITES.items()
        for i, case in enumerate(suite.make({}, False))
        for provider in PROVIDERS
        if case.task in PROVIDERS[provider].tasks
    ]


@pytest.mark.parametrize(("suite", "index", "name"), _params())
def test_provider(benchmark: Any, suite: str, index: int, name: str) -> None:
    enabled = not benchmark.disabled
    if not enabled and _SLOW.get(name, suite) != suite:
        pytest.skip("slow to start; it runs in another suite")
    cases = SUITES[suite].make({} if enabled else _TINY, False)
    if not enabled and (index >= len(cases) or cases[index].task in [case.task for case in cases[:index]]):
        pytest.skip("a task's other shapes are of interest at full size only")
    case = cases[index]
    provider = PROVIDERS[name]
    reasons = provider.reasons(case, _DEVICE)
    if reasons:
        pytest.skip("; ".join(reasons))
    inputs = make_inputs(case, _DEVICE)
    work = provider.build(case, inputs)
    benchmark.group = case.title
    result = benchmark.pedantic(work.step, rounds=3, warmup_rounds=1)
    if not provider.roofline:
        assert check(case, inputs, result, compute_reference(case, inputs)).failed == []
