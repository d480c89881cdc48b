"""One temperature per token in every Triton kernel that transforms logits, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

import logitless as ll
from logitless.kernels.core.stats import OUTPUTS

from ..core.test_token_temperature import by_row, reference, run, temperatures
from ..helpers import gradients, make_case, relative_error
from .conftest import replace_in_backend

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.blas,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
#: float32: the GEMM kernels; float64: the element-wise kernels over blocks of logits in memory.
LIMITS = {torch.float32: 3e-5, torch.float64: 1e-11}


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """The backend, with the labels' entries in the tile as on GPUs."""
    replace_in_backend(monkeypatch, "targets_in_tile", lambda device: True)
    with ll.settings(backend="triton"):
        yield


@pytest.mark.parametrize("peaked", [0.0, -60.0])
@pytest.mark.parametrize("head", [ll.HeadSpec(logit_scale=-0.7), ll.HeadSpec(1.2, 8.0)], ids=["scaled", "softcap"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_statistics_and_gradients(dtype, head, peaked):
    case = make_case(sequences=3, tokens=9, hidden=10, vocab=150, dtype=dtype, bias=True, head=head, peaked=peaked, scale=0.7)
    wide, temperature = case.double(), temperatures(case, dtype)
    stats, exact = run(case, temperature, OUTPUTS), by_row(wide, temperature, reference)
    for name in OUTPUTS:
        value, expected = getattr(stats, name), exact[name]
        if name == "is_top1":
            assert torch.equal(value, expected)
        else:
            assert ((value - expected).abs() / (1 + expected.abs())).max() <= LIMITS[dtype], name
    c = torch.linspace(-1.5, 1, case.labels.numel()).view(case.labels.shape)
    for of_entropy in (0.0, 0.5):
        ours = ((stats.logps + of_entropy * stats.entropy) * c).sum()
        true = ((exact["logps"] + of_entropy * exact["entropy"]) * c).sum()
        for a, b in zip(gradients(ours, case), gradients(true, wide), strict=True):
            assert relative_error(a, b) <= LIMITS[dtype]


@pytest.mark.parametrize("head", [ll.HeadSpec(), ll.HeadSpec(1.2, 8.0)], ids=["plain", "softcap"])
def test_a_policy_loss_with_an_entropy_bonus(head):
    """The tile turns into the gradient of the entropy too."""
    case = make_case(sequences=3, tokens=9, hidden=10, vocab=150, head=head, scale=0.7, train="hw")
    wide, temperature = case.double(), temperatures(case)
    advantages = torch.linspace(-1, 1, case.labels.numel()).view(case.labels.shape)
    with ll.settings(memory_budget=40_000):
        out = ll.FusedLinearPPOLoss(entropy_coef=0.1)(
            case.hidden, case.weight, case.labels, None, head, advantages=advantages, temperature=temperature
        )
    exact = by_row(wide, temperature, reference)
    surrogate = -(advantages * exact["logps"] + 0.1 * exact["entropy"])[case.labels != -100].mean()
    for a, b in zip(gradients(out.loss, case), gradients(surrogate, wide), strict=True):
        assert relative_error(a, b) <= 3e-5
