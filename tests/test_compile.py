"""The operators under torch.library.opcheck and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import logitless as ll
from logitless.kernels.op import _bits

from .helpers import gradients, make_case, run_op

EVERY_BACKEND = True

HEAD = ll.HeadSpec(0.8, 6.0, 1.2)


@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")])
def test_opcheck_of_the_forward_operator(unit, outputs):
    case = make_case(bias=True, train="")
    arguments = (
        case.hidden.reshape(-1, 16),
        case.weight,
        case.bias,
        case.labels.reshape(-1),
        HEAD.pack(),
        -100,
        _bits(outputs),
        unit,
        "auto",
        "auto",
        1 << 20,
    )
    torch.library.opcheck(torch.ops.logitless.logps_forward.default, arguments)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
def test_opcheck_of_the_backward_operator(needs):
    case = make_case(bias=True, train="")
    x, labels = case.hidden.reshape(-1, 16), case.labels.reshape(-1)
    deferred = needs == [True, False, False]
    results = torch.ops.logitless.logps_forward(
        x, case.weight, case.bias, labels, HEAD.pack(), -100, _bits(["entropy"]), int(deferred), "auto", "auto", 1 << 20
    )
    _, entropy, _, _, _, *saved, unit = results
    g = torch.ones(len(labels))
    arguments = (
        x,
        case.weight,
        case.bias,
        labels,
        HEAD.pack(),
        -100,
        *saved,
        entropy,
        unit,
        g,
        g,
        needs,
        "auto",
        "auto",
        1 << 20,
    )
    torch.library.opcheck(torch.ops.logitless.logps_backward.default, arguments)


@pytest.mark.parametrize("train", ["hwb", "h"])
def test_compile_with_fullgraph_and_without_recompiling_per_temperature(train):
    counter = CompileCounterWithBackend("aot_eager")

    def f(x, w, b, labels, head):
        stats = ll.linear_logps(x * 2, w, labels, b, head, ("logps", "entropy"))
        return stats.logps.sum() + 0.1 * stats.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for temperature in (1.0, 0.7, 1.3, 0.9, 2.1):
        case = make_case(bias=True, train=train)
        head = ll.HeadSpec(softcap=9.0, temperature=temperature)
        ours = compiled(case.hidden, case.weight, case.bias, case.labels, head)
        plain = f(case.hidden, case.weight, case.bias, case.labels, head)
        assert torch.allclose(ours, plain)
        for a, b in zip(gradients(ours, case), gradients(plain, case), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert counter.frame_count <= 2  # one with the first temperature, one for all others


def test_compile_follows_token_counts_without_recompiling_each():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, y: ll.linear_logps(x, w, y).logps, fullgraph=True, backend=counter)
    for tokens in (5, 8, 13, 21):
        case = make_case(tokens=tokens)
        assert torch.allclose(compiled(case.hidden, case.weight, case.labels), run_op(case).logps)
    assert counter.frame_count <= 2


def test_a_compiled_model_may_hold_a_loss_module():
    """The modules run eagerly (their schedule depends on the data) inside a compiled caller."""
    case = make_case(train="hw")
    loss = ll.FusedLinearSimPOLoss()

    @torch.compile(backend="aot_eager")
    def step(x, w, labels):
        return loss(torch.tanh(x), w, labels).loss * 2

    expected = loss(torch.tanh(case.hidden), case.weight, case.labels).loss * 2
    got = step(case.hidden, case.weight, case.labels)
    assert torch.allclose(got, expected)
    for a, b in zip(gradients(got, case), gradients(expected, case), strict=True):
        assert torch.allclose(a, b)


def test_settings_hold_inside_compiled_code():
    case = make_case(train="hw")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, y: ll.linear_logps(x, w, y).logps.sum(), fullgraph=True, backend="aot_eager")
    with ll.settings(memory_budget=10_000):
        small = compiled(case.hidden, case.weight, case.labels)
    assert torch.allclose(small, compiled(case.hidden, case.weight, case.labels))
