"""A call's backend is chosen once: everything that runs, in the backward pass too, is of the backend that the plan names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import logitless as ll
from logitless.kernels.backends import registry
from logitless.kernels.backends.interface import Backend, ElementWise

from ..helpers import make_case

NAMES = [name for name, reasons in ll.available_backends().items() if not reasons and name in ("cpu", "torch", "triton")]
OTHER = {"cpu": "torch", "torch": "cpu", "triton": "torch"}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """Backend and function of everything that is called through the registry."""
    found: list[tuple[str, str]] = []

    def noted(backend: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append((backend, name))
            return function(*args, **kwargs)

        return call

    def watched(backend: Backend) -> Backend:
        of_elements = {f.name: getattr(backend.elementwise, f.name) for f in fields(ElementWise)}
        elementwise = ElementWise(**{n: noted(backend.name, n, f) if f is not None else None for n, f in of_elements.items()})
        core = {n: noted(backend.name, n, getattr(backend, n)) for n in ("score", "tile_gradients", "recompute_gradients")}
        return replace(backend, elementwise=elementwise, **core)

    monkeypatch.setattr(registry, "_registry", {name: watched(backend) for name, backend in registry._registry.items()})
    return found


def losses() -> dict[str, Callable[[Any], Any]]:
    def dpo(case):
        return ll.FusedLinearDPOLoss(reference_free=True, metrics=True)(case.hidden, case.weight, case.labels)

    def own_pair_loss(case):
        def fn(pairs):
            return (pairs.chosen_logps - pairs.rejected_logps) ** 2

        return ll.FusedLinearPreferenceLoss(fn)(case.hidden, case.weight, case.labels)

    def grpo(case):
        loss = ll.FusedLinearGRPOLoss("dapo", entropy_coef=0.1, metrics=True)
        return loss(case.hidden, case.weight, case.labels, advantages=torch.ones(len(case.labels)))

    return {"dpo": dpo, "own": own_pair_loss, "grpo": grpo}


@pytest.mark.parametrize("budget", [1 << 30, 20_000], ids=["whole", "tiny"])
@pytest.mark.parametrize("loss", list(losses()))
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_runs_on_the_backend_of_its_plan(calls, name, loss, budget):
    case = make_case(sequences=4, tokens=5, hidden=16, vocab=70, train="hw", dtype=torch.float32)
    with ll.settings(backend=name, memory_budget=budget):
        out = losses()[loss](case)
    assert out.plan.backend == name
    with ll.settings(backend=OTHER[name]):  # whatever the settings are by then
        out.loss.backward()
    assert {backend for backend, _ in calls} == {name}
    assert {"score", "scatter_rows"} <= {function for _, function in calls}
    if loss == "dpo":
        assert ((name, "pair_margins") in calls) == (name == "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_run_on_the_backend_of_the_settings(calls, name):
    case = make_case(sequences=4, tokens=5, hidden=16, vocab=70, train="hw", dtype=torch.float32)
    packed = case.hidden.reshape(-1, 16), case.weight, case.labels.reshape(-1)
    with ll.settings(backend=name):
        logps = ll.sequence_logps(*packed, cu_seqlens=torch.arange(5) * 5)
    with ll.settings(backend=OTHER[name]):
        logps.sum().backward()
    assert {backend for backend, _ in calls} == {name}
    assert {"score", "segment_sum", "recompute_gradients", "scatter_rows"} <= {function for _, function in calls}


@pytest.mark.parametrize("name", NAMES)
def test_advantages_run_on_the_backend_of_the_settings(calls, name):
    with ll.settings(backend=name):
        ll.gae(torch.rand(3, 7), torch.rand(3, 7))
    assert calls == [(name, "gae")]


def test_a_backend_that_does_not_run_on_the_device_is_an_error():
    with ll.settings(backend="cuda"), pytest.raises(RuntimeError, match=r"no backend can serve .*cuda: "):
        ll.gae(torch.rand(3, 7), torch.rand(3, 7))


@pytest.mark.parametrize("function", [f.name for f in fields(ElementWise) if f.name != "pair_margins"])
def test_the_interpreter_of_triton_runs_by_name_alone(function):
    interpreted = registry.get_backend("triton").elementwise
    assert registry.choose_elementwise(torch.device("cpu"), function, "auto") is not interpreted
    if not registry.get_backend("triton").why_unavailable():
        assert registry.choose_elementwise(torch.device("cpu"), function, "triton") is interpreted
