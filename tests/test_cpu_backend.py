"""What the C++ backend promises beyond what every backend does: logits that are never rounded, and a route that is visible."""

from __future__ import annotations

import logging

import pytest
import torch

import logitless as ll
from logitless.kernels import native
from logitless.kernels.reference import reference_logps

from .helpers import relative_error

pytestmark = pytest.mark.skipif(bool(native.why_no_cpu_extension()), reason="; ".join(native.why_no_cpu_extension()))
needs_gemm = pytest.mark.skipif(not native.has_bf16_gemm(), reason="oneDNN has no bfloat16 small GEMM here")
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
