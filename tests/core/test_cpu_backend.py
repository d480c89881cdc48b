"""What the C++ backend promises beyond what every backend does: logits that are never rounded, and a route that is visible."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

import logitless as ll
from logitless.fused.preference.losses.simple import simpo
from logitless.kernels.operators import loading
from logitless.kernels.reference import reference_logps

from ..helpers import relative_error
from .test_cost import peak_bytes

pytestmark = pytest.mark.skipif(bool(loading.why_no_cpu_extension()), reason="; ".join(loading.why_no_cpu_extension()))
needs_gemm = pytest.mark.skipif(not loading.has_bf16_gemm(), reason="oneDNN has no bfloat16 small GEMM here")
HIDDEN, VOCAB, TOKENS = 1024, 65536, 96


@pytest.fixture(autouse=True)
def on_cpu_backend():
    with ll.settings(backend="cpu"):
        yield


def headline_inputs(logits: str):
    """bfloat16 inputs of the benchmark's shape: random, peaked at the target, or with a rival as likely as the target."""
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(VOCAB, HIDDEN, generator=g) / HIDDEN**0.5).bfloat16()
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    y = torch.randint(VOCAB, (TOKENS,), generator=g)
    rows = w[y].float()
    if logits != "random":
        lift = torch.linspace(0, 20, TOKENS)[:, None]
        x = x + lift * rows / rows.square().sum(1, keepdim=True)
    if logits == "rivals":
        rival = w[torch.randint(VOCAB, (TOKENS,), generator=g)].float()
        x = x + (torch.linspace(0, 20, TOKENS)[:, None] + 1) * rival / rival.square().sum(1, keepdim=True)
    return x.bfloat16(), w, y


@needs_gemm
@pytest.mark.parametrize("logits", ["random", "peaked", "rivals"])
def test_logps_of_bfloat16_inputs_are_as_good_as_float32(logits):
    x, w, y = headline_inputs(logits)
    want = reference_logps(x.double(), w.double(), y).logps
    got = ll.linear_logps(x, w, y).logps.double()
    assert ((got - want).abs() / (1 + want.abs())).max() <= 2e-5
    plain = torch.log_softmax((x @ w.t()).float(), -1).gather(1, y[:, None])[:, 0].double()
    assert (got - want).abs().max() <= 0.02 * (plain - want).abs().max()


@needs_gemm
@pytest.mark.parametrize("budget", [512 << 20, 32 << 20], ids=["one tile", "several tiles"])
def test_gradients_round_no_more_than_plain_pytorch(budget):
    g = torch.Generator().manual_seed(1)
    w = (torch.randn(30000, 256, generator=g) / 16).bfloat16()
    y = torch.randint(30000, (8, 40), generator=g)
    lift = 12 * torch.rand(8, 40, 1, generator=g)
    x = (torch.randn(8, 40, 256, generator=g) + lift * w[y].float() / w[y].float().square().sum(-1, keepdim=True)).bfloat16()

    def gradients(dtype, loss_of):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        return torch.autograd.grad(loss_of(a, b), (a, b))

    def plain(a, b):
        logps = torch.log_softmax((a @ b.t()).to(torch.promote_types(a.dtype, torch.float32)), -1)
        chosen, rejected = logps.gather(-1, y[..., None]).sum((1, 2)).split(4)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    def ours(a, b):
        with ll.settings(memory_budget=budget):
            return ll.FusedLinearDPOLoss()(a, b, y, ref_logps=torch.zeros(8)).loss

    exact, theirs, mine = gradients(torch.float64, plain), gradients(torch.bfloat16, plain), gradients(torch.bfloat16, ours)
    for reference, a, b in zip(exact, theirs, mine, strict=True):
        assert relative_error(b, reference) <= 1.05 * relative_error(a, reference)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": 33}, "a hidden size of 33 is not even"),
        ({"dtype": torch.float32}, "hidden states are torch.float32"),
        ({"transposed": True}, "the weight's rows are not contiguous"),
    ],
)
def test_the_other_route_says_why(change, reason, caplog):
    hidden, dtype = change.get("hidden", 34), change.get("dtype", torch.bfloat16)
    x, w, y = torch.randn(5, hidden).to(dtype), torch.randn(70, hidden).to(dtype), torch.arange(5)
    if change.get("transposed"):
        w = w.t().contiguous().t()
    with caplog.at_level(logging.DEBUG, "logitless"):
        ll.linear_logps(x, w, y)
    assert reason in caplog.text
    assert "backend cpu serves" in caplog.text


def test_the_plan_names_the_backend():
    assert ll.plan(num_tokens=10, hidden_size=4, vocab_size=100).backend == "cpu"
    assert "backend cpu" in str(ll.plan(num_tokens=10, hidden_size=4, vocab_size=100))


@needs_gemm
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_autocast_over_any_weight(weight_dtype):
    """The weight's gradient comes in the weight's dtype, whatever the hidden states are computed in."""
    x, y = torch.randn(6, 32), torch.arange(6)
    w = torch.randn(300, 32).to(weight_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ll.linear_logps(x, w, y).logps.sum().backward()
    exact = w.detach().double().requires_grad_()
    torch.log_softmax(x.double() @ exact.t(), -1).gather(1, y[:, None]).sum().backward()
    assert w.grad.dtype == weight_dtype
    assert relative_error(w.grad, exact.grad) <= 0.02


@needs_gemm
def test_a_float32_block_of_dw_stays_within_the_plan():
    """At a large hidden size, many chunks of tokens add to rows of dW that are written once."""
    x = torch.randn(140, 4096).bfloat16().requires_grad_()
    w = (torch.randn(4608, 4096) / 64).bfloat16().requires_grad_()
    y, budget = torch.randint(4608, (140,)), 1 << 20
    shape = {"num_tokens": 140, "hidden_size": 4096, "vocab_size": 4608, "arbitrary_loss": True}
    plan = ll.plan(**shape, memory_budget=budget)

    def step():
        with ll.settings(memory_budget=budget):
            ll.linear_logps(x, w, y).logps.sum().backward()
        return x.grad, w.grad

    assert peak_bytes(step) <= plan.extra_bytes


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_backend_that_is_named_is_the_one_that_runs(backend, monkeypatch):
    """``backend="torch"`` means torch's operators alone in the forward pass."""
    x, w, y = torch.randn(2, 5, 8, requires_grad=True), torch.randn(40, 8), torch.randint(40, (2, 5))
    called = []
    original = torch.ops.logitless.pair_loss
    monkeypatch.setattr(torch.ops.logitless, "pair_loss", lambda *a: called.append(1) or original(*a))
    with ll.settings(backend=backend):
        ll.FusedLinearDPOLoss()(x, w, y, ref_logps=torch.zeros(2))
    assert bool(called) == (backend == "cpu")


def test_a_wrapped_loss_function_is_called_and_not_its_closed_form():
    loss = simpo(beta=2.0, gamma=0.5, label_smoothing=0.0, alpha=0.0)
    hundred = functools.wraps(loss.fn)(lambda pairs: 100 * loss.fn(pairs).losses)
    x, w, y = torch.randn(4, 5, 8, requires_grad=True), torch.randn(40, 8), torch.randint(40, (4, 5))
    once = ll.FusedLinearPreferenceLoss(loss.fn, margin="mean")(x, w, y).loss
    assert torch.allclose(ll.FusedLinearPreferenceLoss(hundred, margin="mean")(x, w, y).loss, 100 * once)
    assert torch.allclose(ll.FusedLinearSimPOLoss(2.0, 0.5)(x, w, y).loss, once)


@needs_gemm
def test_a_default_device_elsewhere_changes_nothing():
    x, w, y = torch.randn(4, 5, 8).bfloat16(), torch.randn(40, 8).bfloat16(), torch.randint(40, (4, 5))

    def step():
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        ll.FusedLinearSimPOLoss()(a, b, y).loss.backward()
        return a.grad, b.grad

    expected = step()
    with torch.device("meta"):
        found = step()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
