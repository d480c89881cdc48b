"""The core and the loss modules on a GPU against float64. ``python -m pytest -m gpu``; elsewhere they are skipped."""

from __future__ import annotations

import math
import os

import pytest
import torch

import logitless as ll
from logitless.kernels.core.stats import OUTPUTS

from ..helpers import gradients, make_case, relative_error, run_op, run_reference

#: ``cpu`` runs the tests of this file without a GPU, to test the tests.
DEVICE = os.environ.get("LOGITLESS_GPU_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Each test runs on each of these. What a GPU may have is not all that ``auto`` would take.
BACKENDS = ("torch", "cuda", "triton") if DEVICE == "cuda" else ("torch", "cpu")


@pytest.fixture(autouse=True, scope="module", params=BACKENDS)
def backend(request):
    if reasons := ll.available_backends()[request.param]:
        pytest.skip(f"{request.param}: " + "; ".join(reasons))
    with ll.settings(backend=request.param):
        yield request.param


HEADS = [ll.HeadSpec(), ll.HeadSpec(0.7, None, 1.3), ll.HeadSpec(1.2, 8.0, 0.6)]
#: Largest error of logps relative to 1 + |logp|, and of gradients, of results that are rounded once.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-5, 2**-7),
    torch.float16: (2e-5, 2**-9),
}


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("peaked", [0.0, 20.0, -60.0])
@pytest.mark.parametrize("train", ["h", "hw", "hwb"])
@pytest.mark.parametrize("budget", [1 << 30, 100_000])
def test_linear_logps(dtype, head, peaked, train, budget):
    case = make_case(dtype=dtype, head=head, peaked=peaked, train=train, bias=True, vocab=20_011, hidden=48).to(DEVICE)
    with ll.settings(memory_budget=budget, precision="float32" if DEVICE == "cpu" else "auto"):
        stats = run_op(case, OUTPUTS)
    wide = case.double()
    reference = run_reference(wide)
    limit, gradient_limit = TOLERANCES[dtype]
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        value, expected = getattr(stats, name), getattr(reference, name)
        assert ((value.double() - expected).abs() / (1 + expected.abs())).max() <= 4 * limit, name
    everything = dict(zip("hwb", (wide.hidden, wide.weight, wide.bias), strict=True))
    for use_entropy in (False, True):
        loss = stats.logps.sum() + (stats.entropy.sum() if use_entropy else 0)
        expected_loss = reference.logps.sum() + (reference.entropy.sum() if use_entropy else 0)
        expected = torch.autograd.grad(expected_loss, [everything[k] for k in "hwb" if k in train], retain_graph=True)
        for ours, theirs in zip(gradients(loss, case), expected, strict=True):
            assert relative_error(ours, theirs) <= 4 * gradient_limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["h", "hw"])
@pytest.mark.parametrize("budget", [1 << 30, 4_000_000, 300_000])
@pytest.mark.parametrize(
    "loss", [ll.FusedLinearDPOLoss(), ll.FusedLinearORPOLoss(), ll.FusedLinearSimPOLoss()], ids=["dpo", "orpo", "simpo"]
)
def test_loss_modules(dtype, train, budget, loss):
    case = make_case(dtype=dtype, train=train, vocab=9001, hidden=64, tokens=40, scale=0.1).to(DEVICE)
    kwargs = {"ref_logps": torch.full((4,), -200.0, device=DEVICE)} if isinstance(loss, ll.FusedLinearDPOLoss) else {}
    with ll.settings(memory_budget=budget):
        out = loss(case.hidden, case.weight, case.labels, **kwargs)
    wide = case.double()
    expected = loss(wide.hidden, wide.weight, wide.labels, **kwargs)
    assert out.loss.double().item() == pytest.approx(expected.loss.item(), rel=1e-4)
    wanted = [wide.hidden, wide.weight][: len(train)]
    for ours, theirs in zip(gradients(out.loss, case), torch.autograd.grad(expected.loss, wanted), strict=True):
        assert relative_error(ours, theirs) <= 4 * TOLERANCES[dtype][1]


def test_identical_policy_and_reference_give_exactly_ln_2():
    case = make_case(dtype=torch.bfloat16, vocab=9001, hidden=64, tokens=40, train="hw").to(DEVICE)
    out = ll.FusedLinearDPOLoss()(
        case.hidden, case.weight, case.labels, ref_hidden=case.hidden.detach(), ref_weight=case.weight.detach()
    )
    assert out.loss.item() == torch.tensor(math.log(2)).item()


def test_autocast_computes_in_its_dtype_and_keeps_gradient_dtypes():
    case = make_case(hidden=64, vocab=500).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels)
        logps = run_op(case).logps
    low = make_case(hidden=64, vocab=500, dtype=torch.bfloat16).to(DEVICE)
    same = ll.FusedLinearSimPOLoss()(low.hidden, low.weight, low.labels)
    assert torch.equal(out.loss, same.loss)
    assert torch.equal(logps, run_op(low).logps)
    for ours, theirs in zip(gradients(out.loss, case), gradients(same.loss, low), strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) < 2**-7
