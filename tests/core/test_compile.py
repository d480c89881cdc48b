"""The public functions under torch.compile: one graph, and not a new one for each temperature or size."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import logitless as ll

from ..conftest import backends
from ..helpers import ENDS_THE_PROCESS, Case, gradients, make_case


def per_token(x, w, y, bounds, head):
    return ll.linear_logps(x, w, y, head=head).logps


def padded(x, w, y, bounds, head):
    return ll.sequence_logps(x, w, y, head=head, reduction="mean")


def packed(x, w, y, bounds, head):
    return ll.sequence_logps(x, w, y, head=head, cu_seqlens=bounds, reduction="mean")


def head_made_inside(x, w, y, bounds, temperature):
    return ll.linear_logps(x, w, y, head=ll.HeadSpec(softcap=9.0).with_temperature(temperature)).logps


def arguments_of(function, case: Case, temperature: float) -> list:
    sequences, tokens = case.labels.shape
    head = temperature if function is head_made_inside else ll.HeadSpec(softcap=9.0, temperature=temperature)
    if function is not packed:
        return [case.hidden, case.weight, case.labels, None, head]
    bounds = torch.arange(sequences + 1) * tokens
    return [case.hidden.flatten(0, 1), case.weight, case.labels.flatten(), bounds, head]


def count_compilations(function, calls, prepare=lambda arguments: None) -> int:
    """How many graphs some calls (sequences, tokens of each, temperature) take. They compute what eager calls do."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for sequences, tokens, temperature in calls:
        case = make_case(sequences=sequences, tokens=tokens, train="hw")
        arguments = arguments_of(function, case, temperature)
        prepare(arguments)
        ours, plain = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(ours, plain)
        leaves = [case.hidden, case.weight]
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(plain.sum(), leaves))
    return counter.frame_count


FUNCTIONS = pytest.mark.parametrize("function", [per_token, padded, packed, head_made_inside], ids=lambda f: f.__name__)
#: Calls that differ in one thing, or in all.
CHANGES = {
    "temperature": [(4, 6, 1.0), (4, 6, 0.7), (4, 6, 1.3), (4, 6, 1.0), (4, 6, 2.1)],
    "tokens": [(4, 6, 0.7), (4, 9, 0.7), (4, 2, 0.7), (4, 40, 0.7)],
    "sequences": [(4, 6, 0.7), (5, 6, 0.7), (2, 6, 0.7), (19, 6, 0.7)],
    "sequences of as many tokens in all": [(4, 6, 0.7), (3, 8, 0.7), (8, 3, 0.7), (2, 12, 0.7)],
    "everything": [(4, 6, 1.0), (5, 9, 0.7), (2, 14, 1.3), (11, 3, 2.1)],
}


@FUNCTIONS
@pytest.mark.parametrize("changes", CHANGES)
def test_fullgraph_takes_one_static_and_one_dynamic_graph(function, changes):
    assert count_compilations(function, CHANGES[changes]) <= 2


@FUNCTIONS
def test_what_changes_in_turn_takes_a_graph_each_and_then_none(function):
    """Dynamo makes dynamic what it has seen change: a graph for the first call, one for each thing that starts to vary."""
    calls = [(4, 6, 1.0), (4, 6, 0.7), (4, 9, 0.8), (5, 9, 0.9), (7, 3, 1.1), (2, 21, 0.6), (4, 6, 1.0)]
    assert count_compilations(function, calls) <= 4


@FUNCTIONS
def test_one_sequence_takes_a_graph_of_its_own(function):
    """Dynamo compiles for sizes of 1 apart, whatever the operators are: such a size broadcasts, and dynamic ones start at 2."""
    calls = [(4, 6, 0.7), (5, 6, 0.7), (1, 6, 0.7), (3, 6, 0.7), (1, 6, 0.7)]
    assert count_compilations(function, calls) <= 3
    assert count_compilations(function, [(1, 6, 0.7), (2, 6, 0.7), (1, 6, 0.7), (9, 6, 0.7)]) <= 2


@FUNCTIONS
def test_sizes_marked_as_dynamic_take_one_graph(function):
    """``mark_dynamic`` is an error where a graph would hold for one size only."""

    def mark(arguments):
        hidden, _, labels, bounds, _ = arguments
        for t in (hidden, labels, bounds):
            for dim in range(0 if t is None else min(t.dim(), labels.dim())):
                torch._dynamo.mark_dynamic(t, dim)

    assert count_compilations(function, [(4, 6, 0.7), (5, 9, 0.7), (2, 14, 0.7), (11, 3, 0.7)], mark) == 1


@pytest.mark.parametrize("chosen", backends())
@pytest.mark.parametrize("train", ["hwb", "h"])
def test_fullgraph_gives_the_gradients_of_every_output(train, chosen):
    def f(x, w, b, labels, head):
        stats = ll.linear_logps(x * 2, w, labels, b, head, ("logps", "entropy"))
        return stats.logps.sum() + 0.1 * stats.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 0.7, 2.1):
        case = make_case(bias=True, train=train)
        head = ll.HeadSpec(softcap=9.0, temperature=temperature)
        with ll.settings(backend=chosen):
            ours = compiled(case.hidden, case.weight, case.bias, case.labels, head)
            plain = f(case.hidden, case.weight, case.bias, case.labels, head)
        assert torch.allclose(ours, plain)
        for a, b in zip(gradients(ours, case), gradients(plain, case), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bounds", [[1, 3, 7], [0, 3, 6], [0, 5, 3, 7]], ids=["start", "end", "falls"])
@pytest.mark.cpu_only(ENDS_THE_PROCESS)
def test_compiled_code_checks_cu_seqlens_when_it_runs(bounds):
    case = make_case(sequences=1, tokens=7, train="")
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, never fall, and end at the token count"):
        compiled(case.hidden[0], case.weight, case.labels[0], torch.tensor(bounds), None)


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
