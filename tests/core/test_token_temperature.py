"""One temperature per token: ``temperature=[like labels]`` of the log-probabilities and the policy losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
from logitless.kernels.core.stats import OUTPUTS

from ..helpers import ENDS_THE_PROCESS, Case, gradients, make_case, relative_error

EVERY_BACKEND = True

HEADS = [ll.HeadSpec(), ll.HeadSpec(logit_scale=-0.7), ll.HeadSpec(1.2, 8.0)]
#: Temperatures of tokens; each test uses several in one row.
VALUES = torch.tensor([0.3, 0.7, 1.0, 1.3, 4.0])


def temperatures(case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One of VALUES at scored positions, NaN at the others."""
    picked = torch.arange(case.labels.numel()).view(case.labels.shape) % len(VALUES)
    return VALUES[picked].to(dtype).masked_fill(case.labels == -100, float("nan"))


def run(case: Case, temperature: torch.Tensor, outputs=("logps",)) -> ll.TokenStats:
    return ll.linear_logps(case.hidden, case.weight, case.labels, case.bias, case.head, outputs, temperature=temperature)


def by_row(case: Case, temperature: torch.Tensor, compute) -> dict[str, torch.Tensor]:
    """The statistics with one call for each temperature, of the rows that have it."""
    results: dict[str, torch.Tensor] = {}
    for value in VALUES:
        rows = temperature == value.to(temperature.dtype)
        labels = case.labels.masked_fill(~rows, -100)
        stats = compute(case.hidden, case.weight, labels, case.bias, replace(case.head, temperature=float(value)))
        for name in OUTPUTS:
            part = getattr(stats, name)
            results[name] = part if name not in results else results[name] + part
    return results


def reference(hidden, weight, labels, bias, head) -> ll.TokenStats:
    return ll.reference_logps(hidden, weight, labels, bias, head)


def op(hidden, weight, labels, bias, head) -> ll.TokenStats:
    return ll.linear_logps(hidden, weight, labels, bias, head, OUTPUTS)


@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("peaked", [0.0, 12.0, -60.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"])
def test_statistics_and_gradients_are_those_of_the_reference_with_a_call_per_temperature(head, peaked, dtype, tolerance):
    case = make_case(dtype=dtype, head=head, bias=True, peaked=peaked, vocab=303, sequences=5)
    wide, temperature = case.double(), temperatures(case, torch.float64)
    temperature = temperature if dtype == torch.float64 else temperature.float()
    stats, expected = run(case, temperature, OUTPUTS), by_row(wide, temperature, reference)
    for name in OUTPUTS:
        value = getattr(stats, name)
        if name == "is_top1":
            assert torch.equal(value, expected[name])
        else:
            assert ((value.double() - expected[name]).abs() / (1 + expected[name].abs())).max() <= tolerance, name
    g = torch.Generator().manual_seed(1)
    c, e = torch.randn(case.labels.shape, generator=g), torch.randn(case.labels.shape, generator=g)
    for with_entropy in (0, 1):
        ours = (stats.logps * c).sum() + with_entropy * (stats.entropy * e).sum()
        true = (expected["logps"] * c).sum() + with_entropy * (expected["entropy"] * e).sum()
        for a, b in zip(gradients(ours, case), gradients(true, wide), strict=True):
            assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize("train", ["hwb", "h", "w"])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_to_calls_with_a_head_of_each_temperature(dtype, head, train):
    """To rounding: the gradient of dW is added up in another order, and is rounded once, not once per temperature."""
    case = make_case(dtype=dtype, head=head, vocab=303, sequences=5, train=train, bias="b" in train)
    temperature = temperatures(case)
    stats, expected = run(case, temperature, OUTPUTS), by_row(case, temperature, op)
    size = 1e-6 if dtype != torch.bfloat16 else 2**-7  # of logits that a CPU's bf16 GEMM rounds
    for name in OUTPUTS:
        if name != "is_top1":
            torch.testing.assert_close(getattr(stats, name), expected[name], rtol=20 * size, atol=20 * size)
    for a, b in zip(gradients(stats.logps.sum(), case), gradients(expected["logps"].sum(), case), strict=True):
        assert relative_error(a, b) <= {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "softcap"])
def test_gradcheck_in_float64(head):
    case = make_case(dtype=torch.float64, sequences=2, tokens=3, hidden=4, vocab=13, head=head, bias=True)
    temperature = temperatures(case, torch.float64)

    def f(x, w, b):
        stats = ll.linear_logps(x, w, case.labels, b, head, ("logps", "entropy"), temperature=temperature)
        return stats.logps, stats.entropy

    assert torch.autograd.gradcheck(f, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("budget", [None, 20_000], ids=["one block", "several blocks"])
@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "own"])
def test_policy_losses_take_a_temperature_per_token(name, budget):
    """Equal temperatures give the loss of a head at that temperature; the reference's states are scored at them too."""
    head = ll.HeadSpec(1.2, 8.0)
    case = make_case(dtype=torch.float64, head=head, vocab=303, bias=True)
    advantages, old = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.full(case.labels.shape, -5.0)
    per_token = advantages[:, None].expand(4, 7)
    temperature = temperatures(case, torch.float64)
    if name == "own":

        def fn(tokens):
            return -(tokens.logps - tokens.ref_logps).exp() * tokens.advantages + tokens.entropies * 0.1

        loss = ll.FusedLinearPolicyLoss(fn, uses_reference=True, entropy_gradient=True)
        given = {"advantages": per_token, "ref_hidden": case.hidden.detach() * 0.9, "ref_weight": case.weight.detach()}
    elif name == "ppo":
        loss, given = ll.FusedLinearPPOLoss(entropy_coef=0.1), {"advantages": per_token, "old_logps": old}
    else:
        level = "sequence" if name == "gspo" else "token"
        loss = ll.FusedLinearGRPOLoss(importance_sampling_level=level)
        given = {"advantages": advantages, "old_logps": old}

    def outcome(**changes):
        with ll.settings(memory_budget=budget):
            out = loss(case.hidden, case.weight, case.labels, case.bias, head, **given, **changes)
        return out, gradients(out.loss, case)

    out, got = outcome(temperature=temperature)
    expected = by_row(case, temperature, reference)["logps"]
    assert (out.logps - expected).abs().max() < 1e-10
    same, same_gradients = outcome(temperature=torch.full_like(temperature, 1.7))
    at_one, its_gradients = outcome_of_head(loss, case, replace(head, temperature=1.7), given, budget)
    assert (same.loss - at_one.loss).abs() < 1e-10
    for a, b in zip(same_gradients, its_gradients, strict=True):
        assert relative_error(a, b) < 1e-10
    assert got[0].isfinite().all() and (got[0] != same_gradients[0]).any()


def outcome_of_head(loss, case, head, given, budget):
    with ll.settings(memory_budget=budget):
        out = loss(case.hidden, case.weight, case.labels, case.bias, head, **given)
    return out, gradients(out.loss, case)


def test_gradients_of_a_policy_loss_are_those_of_autograd_through_the_reference():
    """Every schedule: one tile, several tiles, a frozen head."""
    head = ll.HeadSpec(1.2, 8.0)
    loss = ll.FusedLinearPPOLoss(entropy_coef=0.1)
    for train, budget in (("hw", None), ("hw", 20_000), ("h", None)):
        case = make_case(dtype=torch.float64, head=head, vocab=303, train=train)
        temperature = temperatures(case, torch.float64)
        advantages = torch.linspace(-1, 1, case.labels.numel(), dtype=torch.float64).view(case.labels.shape)
        with ll.settings(memory_budget=budget):
            out = loss(case.hidden, case.weight, case.labels, None, head, advantages=advantages, temperature=temperature)
        exact = by_row(case, temperature, reference)
        scored = case.labels != -100
        surrogate = -(advantages * exact["logps"] + 0.1 * exact["entropy"])[scored].mean()  # ratios are 1
        for a, b in zip(gradients(out.loss, case), gradients(surrogate, case), strict=True):
            assert relative_error(a, b) < 1e-9


def test_sequence_logps_and_cost():
    """No FLOP more than without."""
    case = make_case(head=ll.HeadSpec(softcap=8.0), vocab=303)
    temperature = temperatures(case)
    sums = ll.sequence_logps(case.hidden, case.weight, case.labels, None, case.head, temperature=temperature)
    torch.testing.assert_close(sums, run(case, temperature).logps.sum(1))
    counts = []
    for own in (None, temperature):
        with FlopCounterMode(display=False) as counter:
            ll.linear_logps(case.hidden, case.weight, case.labels, head=case.head, temperature=own).logps.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


BAD = {
    "must be a torch.Tensor, got float": (0.7, TypeError),
    "must be float32 or float64, got torch.bfloat16": (torch.ones(4, 7, dtype=torch.bfloat16), TypeError),
    r"must have shape \(4, 7\) like labels, got \(4,\)": (torch.ones(4), ValueError),
    "must not require a gradient": (torch.ones(4, 7, requires_grad=True), ValueError),
}


def calls(case: Case, head: ll.HeadSpec) -> list:
    given = case.hidden, case.weight, case.labels, None, head
    return [
        lambda t: ll.linear_logps(*given, temperature=t),
        lambda t: ll.sequence_logps(*given, temperature=t),
        lambda t: ll.FusedLinearPPOLoss()(*given, advantages=torch.ones(4, 7), temperature=t),
        lambda t: ll.FusedLinearGRPOLoss()(*given, advantages=torch.ones(4), temperature=t),
    ]


@pytest.mark.parametrize("message", BAD)
def test_bad_temperatures_are_errors_that_name_the_argument(message):
    value, error = BAD[message]
    for call in calls(make_case(), ll.HeadSpec()):
        with pytest.raises(error, match=rf"^temperature {message}"):
            call(value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.cpu_only(ENDS_THE_PROCESS)
def test_a_temperature_out_of_range_at_a_scored_position_is_an_error(value):
    case = make_case(masked=0.0)
    temperature = torch.ones(case.labels.shape)
    temperature[1, 2] = value
    for call in calls(case, ll.HeadSpec()):
        with pytest.raises(ValueError, match=rf"^temperature must be finite and > 0 at every scored position, got {value}"):
            call(temperature)
    case.labels[1, 2] = -100
    for call in calls(case, ll.HeadSpec()):
        call(temperature)


def test_a_temperature_beside_that_of_the_head_is_an_error():
    case = make_case()
    for call in calls(case, ll.HeadSpec(temperature=0.7)):
        with pytest.raises(ValueError, match=r"^temperature is given beside head\.temperature=0\.7: pass one of them"):
            call(torch.ones(case.labels.shape))


def test_compiled_code_takes_new_temperatures_without_a_new_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(x, w, y, t):
        return ll.linear_logps(x, w, y, head=ll.HeadSpec(softcap=9.0), temperature=t).logps.sum()

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for factor in (1.0, 0.7, 2.1):
        case = make_case(train="hw")
        given = case.hidden, case.weight, case.labels, temperatures(case) * factor
        ours, plain = compiled(*given), f(*given)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(gradients(ours, case), gradients(plain, case))
    assert counter.frame_count == 1
