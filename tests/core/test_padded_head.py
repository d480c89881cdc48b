"""``HeadSpec.vocab_size``: the padding rows of a head do not exist, whatever stands there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
from logitless.kernels.core.stats import OUTPUTS

from ..helpers import Case, gradients, make_case, run_op, run_reference
from .test_cost import peak_bytes

EVERY_BACKEND = True

ENTRIES, PADDING = 101, 27
HEADS = [ll.HeadSpec(), ll.HeadSpec(1.2, 8.0, 0.6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def padded(case: Case, value: float = float("nan")) -> Case:
    """The same head with rows of ``value`` behind it, and its real number of entries."""

    def pad(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        rows = torch.full((PADDING, *t.shape[1:]), value, dtype=t.dtype)
        return torch.cat((t.detach(), rows)).requires_grad_(t.requires_grad)

    head = replace(case.head, vocab_size=ENTRIES)
    return Case(case.hidden.detach().requires_grad_(), pad(case.weight), pad(case.bias), case.labels, head)


def assert_same_with_zeros(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Gradients of hidden, weight and bias; those of the padding rows are 0."""
    dx, *of_head = got
    assert torch.equal(dx, expected[0])
    for ours, theirs in zip(of_head, expected[1:], strict=True):
        assert len(ours) == ENTRIES + PADDING
        assert torch.equal(ours[:ENTRIES], theirs)
        assert not ours[ENTRIES:].any()


@pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_and_gradients_are_those_of_the_head_without_padding(head, dtype):
    case = make_case(dtype=dtype, head=head, bias=True, vocab=ENTRIES)
    whole = padded(case)
    ours, plain = run_op(whole, OUTPUTS), run_op(case, OUTPUTS)
    for name in OUTPUTS:
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    reference = run_reference(whole)
    for name in OUTPUTS:
        assert torch.equal(getattr(reference, name), getattr(run_reference(case), name)), name
    c = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(1))
    got, expected = (gradients((s.logps * c).sum() + s.entropy.sum(), k) for s, k in ((ours, whole), (plain, case)))
    assert_same_with_zeros(got, expected)
    expected = gradients((run_reference(case).logps * c).sum(), case)
    assert_same_with_zeros(gradients((run_reference(whole).logps * c).sum(), whole), expected)


def losses() -> dict:
    """Modules by name, each with what else it is called with: (arguments by the case, whether it has a reference head)."""
    labels = torch.zeros(4, 7)
    return {
        "dpo": (ll.FusedLinearDPOLoss(), {}, True),
        "simpo": (ll.FusedLinearSimPOLoss(), {}, False),
        "cpo": (ll.FusedLinearCPOLoss(), {}, False),
        "orpo": (ll.FusedLinearORPOLoss(), {}, False),
        "kto": (ll.FusedLinearKTOLoss(), {"desirable": torch.tensor([True, False, False, True]), "kl": 0.1}, True),
        "ppo": (
            ll.FusedLinearPPOLoss(entropy_coef=0.1),
            {"old_logps": labels - 4.0, "advantages": labels + 1.0},
            False,
        ),
        "grpo": (ll.FusedLinearGRPOLoss(beta=0.1), {"advantages": torch.tensor([1.0, -1.0, 0.5, -0.5])}, True),
    }


@pytest.mark.parametrize("budget", [None, 30_000], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("name", losses())
def test_a_loss_is_that_of_the_head_without_padding(name, budget):
    """The reference's head may be padded to another size."""
    loss, arguments, has_reference = losses()[name]
    case = make_case(bias=True, vocab=ENTRIES, head=ll.HeadSpec(softcap=8.0))
    whole = padded(case)
    results = []
    for one in (whole, case):
        reference = {}
        if has_reference:
            extra = 0 if one is case else 5
            ref_weight = torch.cat((case.weight.detach() * 0.9, torch.full((extra, 16), float("nan"))))
            reference = {"ref_hidden": case.hidden.detach(), "ref_weight": ref_weight}
        with ll.settings(memory_budget=budget):
            out = loss(one.hidden, one.weight, one.labels, bias=one.bias, head=one.head, **reference, **arguments)
        results.append((out.loss, gradients(out.loss, one), out.plan))
    (ours, got, plan), (plain, expected, plain_plan) = results
    assert torch.equal(ours, plain) and ours.isfinite()
    assert_same_with_zeros(got, expected)
    assert (plan.steps, plan.flops, plan.backend) == (plain_plan.steps, plain_plan.flops, plain_plan.backend)
    assert plan.extra_bytes > plain_plan.extra_bytes


def test_padding_costs_no_flop_and_the_bytes_of_its_rows_of_the_gradient():
    """As many padding rows as entries: FLOP of the entries alone, bytes of one gradient with twice as many rows."""
    x, labels = torch.randn(4, 24, 32).requires_grad_(), torch.randint(1024, (4, 24))
    w = torch.randn(2048, 32).requires_grad_()
    loss = ll.FusedLinearSimPOLoss()

    def op_step(weight: torch.Tensor, head: ll.HeadSpec) -> None:
        ll.linear_logps(x, weight, labels, head=head).logps.sum().backward()

    def loss_step(weight: torch.Tensor, head: ll.HeadSpec) -> None:
        loss(x, weight, labels, head=head).loss.backward()

    for step, passes in ((op_step, 8), (loss_step, 6)):
        counts, peaks = [], []
        for weight, head in ((w, ll.HeadSpec(vocab_size=1024)), (w.detach()[:1024].clone().requires_grad_(), ll.HeadSpec())):
            x.grad = w.grad = weight.grad = None
            with FlopCounterMode(display=False) as counter:
                step(weight, head)
            x.grad = w.grad = weight.grad = None
            counts.append(counter.get_total_flops())
            peaks.append(peak_bytes(lambda step=step, weight=weight, head=head: step(weight, head)))
        assert counts[0] == counts[1] == passes * labels.numel() * 1024 * 32
        rows = 1024 * 32 * w.dtype.itemsize
        assert peaks[0] <= peaks[1] + rows  # nothing else of the padding's size, and no temporary of the whole gradient


@pytest.mark.parametrize("vocab_size", [0, -1, 2.0, True, "7"])
def test_a_vocab_size_that_no_head_has_is_an_error(vocab_size):
    with pytest.raises((TypeError, ValueError), match=r"^vocab_size must be"):
        ll.HeadSpec(vocab_size=vocab_size)


@pytest.mark.cpu_only("on a GPU a label out of range ends the process")
def test_more_entries_than_rows_and_labels_in_the_padding_are_errors():
    case = make_case(vocab=ENTRIES, masked=0)
    too_large = ll.HeadSpec(vocab_size=ENTRIES + 1)
    loss = ll.FusedLinearSimPOLoss()
    given = case.hidden, case.weight, case.labels
    for call in (
        lambda: ll.linear_logps(*given, head=too_large),
        lambda: ll.sequence_logps(*given, head=too_large),
        lambda: loss(*given, head=too_large),
    ):
        with pytest.raises(ValueError, match=r"^head.vocab_size must be at most 101, the number of rows of weight, got 102"):
            call()
    with pytest.raises(ValueError, match=r"^vocab_size of the HeadSpec must be at most the 101 rows of the head, got 102"):
        too_large.apply(torch.zeros(2, ENTRIES))
    dpo = ll.FusedLinearDPOLoss()
    with pytest.raises(ValueError, match=r"^head.vocab_size must be at most 90, the number of rows of ref_weight, got 101"):
        dpo(*given, head=ll.HeadSpec(vocab_size=ENTRIES), ref_hidden=case.hidden, ref_weight=case.weight[:90])
    labels = case.labels.clone()
    labels[1, 2] = 90
    for call in (
        lambda: ll.linear_logps(case.hidden, case.weight, labels.clamp(max=90), head=ll.HeadSpec(vocab_size=90)),
        lambda: loss(case.hidden, case.weight, labels.clamp(max=90), head=ll.HeadSpec(vocab_size=90)),
    ):
        with pytest.raises(ValueError, match=r"^labels must be in \[0, 90\)"):
            call()


def test_compiled_code_serves_padded_heads_without_a_graph_per_temperature():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(x, w, y, temperature):
        return ll.linear_logps(x, w, y, head=ll.HeadSpec(temperature=temperature, vocab_size=ENTRIES)).logps.sum()

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    counts = []
    for temperature in (0.7, 1.3, 2.1, 0.4):
        whole = padded(make_case(vocab=ENTRIES, train="hw"))
        given = whole.hidden, whole.weight, whole.labels, temperature
        ours, plain = compiled(*given), f(*given)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(gradients(ours, whole), gradients(plain, whole))
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 3
