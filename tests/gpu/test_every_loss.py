"""Every loss on every backend of a GPU: against float64, and the same bits in 100 runs; trained, frozen and forward only.

``python -m pytest -m gpu``; ``LOGITLESS_GPU_TEST_DEVICE=cpu`` runs it at small sizes on a CPU. Inputs, float64 reference and
checks are the benchmark's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.bench import providers  # noqa: F401 (registers them)
from logitless.bench.core.cases import Case, Shape
from logitless.bench.core.inputs import make_inputs
from logitless.bench.core.reference import check, compute_reference, token_error
from logitless.bench.core.registry import PROVIDERS, Result

from .test_limits import DEVICE, ON_GPU, RUNS, backend, pytestmark  # noqa: F401

#: V a multiple of nothing, responses of different lengths, a soft-cap where it says so.
SHAPE = Shape(pairs=4, tokens=200, hidden=768, vocab=50_257, spread=3.0, logits="peaked")
if not ON_GPU:
    SHAPE = Shape(pairs=2, tokens=12, hidden=32, vocab=301, spread=3.0, logits="peaked")
TASKS = {
    "dpo": "gpu",
    "simpo": "gpu",
    "orpo": "gpu",
    "kto": "gpu",
    "dapo": "policy-gpu",
    "dapo-entropy": "policy-gpu",
    "ppo": "policy-gpu",
}
#: Logits are not rounded, whatever the backend; gradients once.
LOGPS, GRADIENTS = 1e-3, 2**-6


def tensors(result: Result) -> list[Tensor]:
    found = (result.loss, result.token_logps, result.sequence_logps, result.dhidden, result.dweight)
    return [t for t in found if t is not None]


@pytest.mark.parametrize("mode", ["trained", "frozen", "forward only"])
@pytest.mark.parametrize("budget", [None, 8 << 20], ids=["default budget", "8 MiB"])
@pytest.mark.parametrize("task", TASKS)
def test_every_loss_is_that_of_float64_with_the_same_bits_in_100_runs(backend, task, budget, mode):  # noqa: F811
    shape = SHAPE if budget is None else replace(SHAPE, softcap=20.0)  # several tiles, and the other path of the epilogue
    case = Case(TASKS[task], task, shape, train_head=mode == "trained", backward=mode != "forward only")
    name = f"logitless:policy@{backend}" if TASKS[task] == "policy-gpu" else f"logitless@{backend}"
    if reasons := PROVIDERS[name].reasons(case, torch.device(DEVICE)):
        pytest.skip("; ".join(reasons))
    inputs = make_inputs(case, torch.device(DEVICE))
    reference = compute_reference(case, inputs)
    work = PROVIDERS[name].build(case, inputs)
    with ll.settings(**({} if budget is None else {"memory_budget": budget})):
        first = work.step()
        errors = check(case, inputs, first, reference)
        by_token = token_error(case, inputs, work, reference)
        assert errors.failed == []
        assert by_token is None or by_token < LOGPS
        assert errors.token_logps is None or errors.token_logps < LOGPS
        assert (by_token is None) != (errors.token_logps is None)
        for error in (errors.dhidden, errors.dweight):
            assert error is None or error < GRADIENTS
        assert (errors.dweight is not None) == (mode == "trained")
        kept = [t.clone() for t in tensors(first)]
        for _ in range(RUNS - 1):
            assert all(torch.equal(a, b) for a, b in zip(kept, tensors(work.step()), strict=True))
