"""LoRA on the head: the merged weight's results and gradients, at the cost of the formula and without its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.kernels.core.stats import OUTPUTS

from ..helpers import Case, make_case, relative_error
from .test_cost import LOSSES, budget_for_rows, flops, peak_bytes, scored

EVERY_BACKEND = True

R, SCALING = 3, 0.75
HEADS = [ll.HeadSpec(), ll.HeadSpec(1.2, 8.0, 0.6), ll.HeadSpec(vocab_size=90)]
POLICY = {
    "ppo": (ll.FusedLinearPPOLoss(), {"old_logps": torch.full((4, 7), -4.0)}),
    "grpo with entropy": (ll.FusedLinearGRPOLoss(entropy_coef=0.3, loss_type="grpo"), {}),
    "sequence ratios": (ll.FusedLinearGRPOLoss(importance_sampling_level="sequence"), {}),
}
ADVANTAGES = {"advantages": torch.tensor([1.0, -1.0, 0.5, 2.0])}
MODULES: dict[str, tuple[Any, dict[str, Any]]] = {
    **LOSSES,
    **{name: (loss, {**ADVANTAGES, **given}) for name, (loss, given) in POLICY.items()},
}


def adapter(vocab: int, hidden: int, r: int = R, dtype=torch.float32, seed: int = 5, scale: float = 0.3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (r, hidden), (vocab, r)
    return [(torch.randn(*s, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_() for s in shapes]


def merged(case: Case, *adapters: list[Tensor]) -> Tensor:
    """The sum that is never formed, in float64."""
    return case.weight.double() + sum(SCALING * B.double() @ A.double() for A, B in adapters)


def lora(case: Case, *adapters: list[Tensor], **options: Any) -> Any:
    weight: Any = case.weight.detach()
    for A, B in adapters:
        weight = ll.LoRAWeight(weight, A, B, SCALING, **options)
    return weight


def compare(value: Tensor, wanted: Tensor, leaves: list[Tensor], limit: float) -> None:
    ours, theirs = (torch.autograd.grad(v, leaves) for v in (value, wanted))
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == reference.dtype
        assert relative_error(mine, reference) < limit


@pytest.mark.parametrize("budget", [1 << 14, 1 << 26], ids=["small", "large"])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap", "padded"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=str)
def test_log_probabilities_and_gradients_are_those_of_the_merged_weight(dtype, limit, head, budget):
    """Two adapters of different rank, a trained bias, NaN where nothing is scored."""
    case = make_case(dtype=dtype, head=head, bias=True)
    case.labels[case.labels >= 90] = 7
    adapters = [adapter(101, 16, r, dtype, seed=r) for r in (3, 5)]
    hidden = case.hidden.detach().masked_fill(case.labels[..., None] == -100, float("nan")).requires_grad_()
    with ll.settings(memory_budget=budget):
        got = ll.linear_logps(hidden, lora(case, *adapters), case.labels, case.bias, head, OUTPUTS)
    wanted = ll.reference_logps(hidden, merged(case, *adapters), case.labels, case.bias, head)
    for name in OUTPUTS:
        torch.testing.assert_close(
            getattr(got, name), getattr(wanted, name).to(getattr(got, name).dtype), rtol=limit, atol=limit
        )
    c = torch.randn(case.labels.shape, generator=torch.Generator().manual_seed(1))
    leaves = [hidden, case.bias, *(t for pair in adapters for t in pair)]
    compare(*((s.logps * c + 0.3 * s.entropy).sum() for s in (got, wanted)), leaves, 10 * limit)
    assert case.weight.grad is None


@pytest.mark.parametrize("rows", [3, 1000], ids=["several tiles", "one tile"])
@pytest.mark.parametrize("name", MODULES)
def test_every_loss_module(name, rows):
    loss, given = MODULES[name]
    case = make_case(vocab=4096, scale=0.3, dtype=torch.float64)
    pair = adapter(4096, 16, dtype=torch.float64)
    with ll.settings(memory_budget=budget_for_rows(rows, 8)):
        value = loss(case.hidden, lora(case, pair), case.labels, **given).loss
        wanted = loss(case.hidden, merged(case, pair), case.labels, **given).loss
    torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)
    compare(value, wanted, [case.hidden, *pair], 1e-10)


@pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap", "padded"])
def test_a_reference_with_an_adapter(head):
    case, pair, other = make_case(), adapter(101, 16), adapter(101, 16, seed=9)
    case.labels[case.labels >= 90] = 7
    loss, x = ll.FusedLinearDPOLoss(), case.hidden.detach()
    ref = {"ref_hidden": x, "ref_weight": lora(case, other), "head": head}
    out = loss(case.hidden, lora(case, pair), case.labels, **ref)
    wanted = loss(case.hidden, lora(case, pair), case.labels, **{**ref, "ref_weight": merged(case, other).float()})
    torch.testing.assert_close(out.ref_logps, wanted.ref_logps)
    same = loss(x, lora(case, pair), case.labels, head=head, ref_hidden=x, ref_weight=lora(case, pair)).loss
    assert same.item() == pytest.approx(0.6931471805599453, abs=1e-7)
    out.loss.backward()
    assert all(t.grad is None for t in other)


@pytest.mark.parametrize("train", ["hAB", "AB", "B", "A", "h", ""])
def test_frozen_parts_get_no_gradient(train):
    case, (A, B) = make_case(), adapter(101, 16)
    hidden = case.hidden.detach().requires_grad_("h" in train)
    leaves = {"h": hidden, "A": A.requires_grad_("A" in train), "B": B.requires_grad_("B" in train)}
    weight = lora(case, [A, B])
    values = [ll.sequence_logps(hidden, weight, case.labels).sum(), ll.FusedLinearSimPOLoss()(hidden, weight, case.labels).loss]
    wanted = ll.FusedLinearSimPOLoss()(hidden, merged(case, [A, B]).float(), case.labels).loss
    assert all(v.requires_grad == bool(train) for v in values)
    if train:
        values[0].backward(retain_graph=True)
        assert all((leaf.grad is not None) == (name in train) for name, leaf in leaves.items())
        compare(values[1], wanted, [leaves[name] for name in train], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_any_batch(dtype):
    case, pair = make_case(sequences=1, tokens=700, hidden=64, dtype=dtype, masked=0.0), adapter(101, 64, 8)
    x, y, weight = case.hidden[0].detach(), case.labels[0], lora(case, pair)
    whole = ll.linear_logps(x, weight, y).logps
    for start, stop in ((0, 1), (3, 4), (5, 22), (100, 620), (690, 700)):
        assert torch.equal(ll.linear_logps(x[start:stop], weight, y[start:stop]).logps, whole[start:stop])


def test_one_temperature_per_token():
    case, pair = make_case(dtype=torch.float64), adapter(101, 16, dtype=torch.float64)
    tau = torch.rand(case.labels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    values = [
        ll.linear_logps(case.hidden, weight, case.labels, temperature=tau).logps.sum()
        for weight in (lora(case, pair), merged(case, pair))
    ]
    torch.testing.assert_close(*values)
    compare(*values, [case.hidden, *pair], 1e-11)


def test_dropout_is_applied_to_the_input_of_the_adapter_alone():
    case, pair = make_case(masked=0.0), adapter(101, 16)
    doubled = ll.linear_logps(case.hidden, lora(case, pair, dropout=lambda x: 2 * x), case.labels).logps
    wanted = ll.reference_logps(
        case.hidden, case.weight.double() + 2 * SCALING * pair[1].double() @ pair[0].double(), case.labels
    )
    torch.testing.assert_close(doubled.double(), wanted.logps, rtol=0, atol=1e-5)
    dropout = torch.nn.Dropout(0.5)
    torch.manual_seed(1)
    first = ll.linear_logps(case.hidden, lora(case, pair, dropout=dropout), case.labels).logps
    torch.manual_seed(1)
    u = torch.nn.functional.linear(dropout(case.hidden), pair[0]) @ pair[1].t() * SCALING
    logits = (case.hidden @ case.weight.t() + u).log_softmax(-1)
    torch.testing.assert_close(first, logits.gather(-1, case.labels[..., None])[..., 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "orpo", "ppo"])
def test_flop_of_loss_modules_and_the_operator(name):
    loss, given = MODULES[name]
    hidden, vocab, r = 64, 4096, 8
    case, pair = make_case(hidden=hidden, vocab=vocab), adapter(vocab, hidden, r)
    unit = scored(case.labels) * hidden * vocab
    weight, plans = lora(case, pair), []

    def step() -> None:
        out = loss(case.hidden, weight, case.labels, **given)
        plans.append(out.plan)
        out.loss.backward()

    counted = flops(step)
    assert (4 + 6 * r / hidden) * unit <= counted <= 1.02 * (4 + 6 * r / hidden) * unit
    assert plans[0].passes == pytest.approx(4 + 6 * r / hidden)
    counted = flops(lambda: ll.linear_logps(case.hidden, weight, case.labels).logps.sum().backward())
    assert (6 + 8 * r / hidden) * unit <= counted <= 1.02 * (6 + 8 * r / hidden) * unit
    frozen = ll.LoRAWeight(case.weight.detach(), *(t.detach() for t in pair))
    counted = flops(lambda: ll.linear_logps(case.hidden, frozen, case.labels).logps.sum().backward())
    assert counted <= 1.02 * (4 + 4 * r / hidden) * unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_weight_is_allocated(dtype):
    """V * H is far above the budget; the blocks that are read, B's gradient and the budget are what there is."""
    hidden, vocab, budget = 64, 60_000, 1 << 20
    case, pair = make_case(hidden=hidden, vocab=vocab, dtype=dtype, tokens=3), adapter(vocab, hidden)
    weight = lora(case, pair)
    whole = vocab * hidden * dtype.itemsize
    plans: list[Any] = []

    def module() -> Any:
        out = ll.FusedLinearSimPOLoss()(case.hidden, weight, case.labels)
        plans.append(out.plan)
        return torch.autograd.grad(out.loss, [case.hidden, *pair])

    def operator() -> Any:
        return torch.autograd.grad(ll.linear_logps(case.hidden, weight, case.labels).logps.sum(), [case.hidden, *pair])

    with ll.settings(memory_budget=budget):
        assert peak_bytes(operator) < 0.75 * whole
        measured = peak_bytes(module)
    inputs = case.hidden.numel() * 4 * 8
    assert measured <= plans[0].extra_bytes + inputs
    assert measured < 0.75 * whole


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(base):
    """The product runs in the dtype of autocast; the adapter's input is computed in its own."""
    case, pair = make_case(), adapter(101, 16)
    weight = ll.LoRAWeight(case.weight.detach().to(base), *pair)
    with torch.autocast(case.hidden.device.type, torch.bfloat16):
        got = ll.linear_logps(case.hidden, weight, case.labels).logps
    wanted = ll.reference_logps(case.hidden, case.weight.double() + pair[1].double() @ pair[0].double(), case.labels).logps
    assert relative_error(got, wanted) < 0.02
    grads, exact = (torch.autograd.grad(v.sum(), [case.hidden, *pair]) for v in (got, wanted))
    assert all(a.dtype == torch.float32 and relative_error(a, b) < 0.03 for a, b in zip(grads, exact, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": torch.ones(11, 4, requires_grad=True)}, ValueError, "base requires a gradient"),
        ({"base": torch.ones(11)}, TypeError, r"base must be a weight of shape \[vocab, hidden\], got \(11,\)"),
        ({"base": None}, TypeError, "base must be a weight.*NoneType"),
        ({"lora_A": torch.ones(2, 5)}, ValueError, r"lora_A must have shape \[r, 4\], got \(2, 5\)"),
        ({"lora_B": torch.ones(11, 3)}, ValueError, r"lora_B must have shape \[11, 2\], got \(11, 3\)"),
        ({"lora_B": torch.ones(11, 2).long()}, TypeError, "lora_B must be a floating point matrix"),
        ({"scaling": float("nan")}, TypeError, "scaling must be a finite number"),
        ({"scaling": True}, TypeError, "scaling must be a finite number"),
        ({"dropout": 0.1}, TypeError, "dropout must be a function"),
    ],
)
def test_arguments_of_the_adapter(change, error, message):
    given = {"base": torch.ones(11, 4), "lora_A": torch.ones(2, 4), "lora_B": torch.ones(11, 2)}
    ll.LoRAWeight(**given)
    with pytest.raises(error, match=message):
        ll.LoRAWeight(**{**given, **change})


def test_arguments_beside_an_adapter():
    case, pair = make_case(), adapter(101, 16)
    weight = lora(case, pair)
    with pytest.raises(ValueError, match=r"hidden must have shape \[\.\.\., 16\] to match weight"):
        ll.linear_logps(case.hidden[..., :8], weight, case.labels)
    with pytest.raises(ValueError, match=r"bias must have shape \[101\]"):
        ll.linear_logps(case.hidden, weight, case.labels, torch.zeros(7))
    with pytest.raises(TypeError, match="would be rounded"):
        ll.linear_logps(case.hidden.bfloat16(), weight, case.labels)
    with pytest.raises(ValueError, match=r"must be in \[0, 101\)"):
        ll.linear_logps(case.hidden, weight, torch.full_like(case.labels, 101))
    with pytest.raises(ValueError, match="vocab_size must be at most 101"):
        ll.linear_logps(case.hidden, weight, case.labels, head=ll.HeadSpec(vocab_size=102))


def test_backends_that_read_whole_tensors_say_so(backend):
    plan = ll.plan(num_tokens=8, hidden_size=16, vocab_size=101, lora_rank=3, dtype=torch.float32)
    assert plan.backend == backend
    for wrong in ({"lora_rank": -1}, {"lora_rank": True}, {"quantized": 1}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            ll.plan(num_tokens=8, hidden_size=16, vocab_size=101, **wrong)
    with pytest.raises(ValueError, match="frozen unless it has an adapter"):
        ll.plan(num_tokens=8, hidden_size=16, vocab_size=101, quantized=True)
    pytest.importorskip("triton")
    with (
        ll.settings(backend="triton"),
        pytest.raises(RuntimeError, match="triton: it reads the weight as one tensor"),
    ):
        ll.linear_logps(make_case().hidden, lora(make_case(), adapter(101, 16)), make_case().labels)


def test_the_backward_pass_reads_the_current_weights_or_fails():
    case, pair = make_case(), adapter(101, 16)
    base = case.weight.detach().clone()
    logps = ll.linear_logps(case.hidden, ll.LoRAWeight(base, *pair), case.labels).logps
    base.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_backward_twice_and_inside_a_compiled_function():
    case, pair = make_case(), adapter(101, 16)

    def step(hidden: Tensor) -> Tensor:
        return ll.linear_logps(hidden, lora(case, pair), case.labels).logps.sum()

    value = step(case.hidden)
    first, second = (torch.autograd.grad(value, [case.hidden, *pair], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    compiled: Callable[[Tensor], Tensor] = torch.compile(step, backend="eager")
    assert all(
        torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(compiled(case.hidden), [case.hidden, *pair]), strict=True)
    )
