"""What calls cost: FLOP counted by torch's counter, bytes counted by torch's allocator. Both are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
from logitless.kernels import logps_operators as op

EVERY_BACKEND = True

H, V = 32, 4096
N_SEQUENCES, TOKENS = 4, 24


def flops(fn: Callable[[], object], batch_invariant: bool | None = False) -> int:
    """FLOP of a call, without the padding rows of batch invariance, of which ``test_padding_rows_*`` counts the cost."""
    with ll.settings(batch_invariant=batch_invariant), FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def peak_bytes(fn: Callable[[], object]) -> int:
    """Most bytes that torch's allocator held at once during a call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = fn()  # noqa: F841 - results are part of what the call needs
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def inputs(
    train: str = "hw", tokens: int = TOKENS, hidden: int = H, vocab: int = V, dtype=torch.float32, masked: int = 6, sequences=4
):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sequences, tokens, hidden, generator=g).to(dtype).requires_grad_("h" in train)
    w = (torch.randn(vocab, hidden, generator=g) * 0.1).to(dtype).requires_grad_("w" in train)
    labels = torch.randint(vocab, (sequences, tokens), generator=g)
    labels[:, :masked] = -100
    return x, w, labels


def scored(labels: torch.Tensor) -> int:
    return int((labels != -100).sum())


LOSSES = {
    "dpo": (ll.FusedLinearDPOLoss(), {"ref_logps": torch.zeros(4)}),
    "dpo mix": (ll.FusedLinearDPOLoss(loss_type=["sigmoid", "bco_pair", "sft"]), {"ref_logps": torch.zeros(4)}),
    "wpo": (ll.FusedLinearDPOLoss(use_weighting=True), {"ref_logps": torch.zeros(4)}),
    "aot": (ll.FusedLinearDPOLoss(loss_type="aot"), {"ref_logps": torch.zeros(4)}),
    "ipo": (ll.FusedLinearIPOLoss(), {"ref_logps": torch.zeros(4)}),
    "simpo": (ll.FusedLinearSimPOLoss(), {}),
    "cpo": (ll.FusedLinearCPOLoss(), {}),
    "orpo": (ll.FusedLinearORPOLoss(), {}),
    "kto": (
        ll.FusedLinearKTOLoss(),
        {"ref_logps": torch.zeros(4), "desirable": torch.tensor([True, False, False, True]), "kl": 0.1},
    ),
    "own": (ll.FusedLinearPreferenceLoss(lambda pairs: (pairs.rejected_logps - pairs.chosen_logps).exp()), {}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("train", "limit"), [("hw", 6.02), ("h", 4.02), ("w", 4.02), ("", 2.01)])
def test_every_loss_module_needs_6_4_or_2(name, train, limit):
    loss, arguments = LOSSES[name]
    x, w, labels = inputs(train)

    def step() -> None:
        out = loss(x, w, labels, **arguments)
        if train:
            out.loss.backward()

    counted = flops(step)
    assert 0 < counted <= limit * scored(labels) * H * V


def test_metrics_cost_no_gemm():
    x, w, labels = inputs()
    loss = ll.FusedLinearDPOLoss(metrics=True)
    assert flops(lambda: loss(x, w, labels, ref_logps=torch.zeros(4)).loss.backward()) == 6 * scored(labels) * H * V


def test_reference_hidden_states_cost_one_forward_pass():
    x, w, labels = inputs()
    loss = ll.FusedLinearDPOLoss()
    counted = flops(lambda: loss(x, w, labels, ref_hidden=x.detach(), ref_weight=w.detach()).loss.backward())
    assert counted == 8 * scored(labels) * H * V


def test_nll_labels_are_scored_for_chosen_sequences_alone():
    x, w, labels = inputs()
    nll_labels = torch.where(labels == -100, 7, labels)  # prompt and response
    counted = flops(lambda: ll.FusedLinearORPOLoss()(x, w, labels, nll_labels=nll_labels).loss.backward())
    assert counted == 6 * (scored(labels) + int((labels[:2] == -100).sum())) * H * V


def budget_for_rows(rows: int, itemsize: int = 4) -> int:
    """A budget whose tiles hold about that many tokens."""
    return int(rows * V * itemsize * 4 / 3) + 4096


MARGIN_LOSSES = {
    "sigmoid": ll.FusedLinearDPOLoss(label_smoothing=0.1),
    "hinge": ll.FusedLinearDPOLoss(loss_type="hinge"),
    "ipo": ll.FusedLinearDPOLoss(loss_type="ipo"),
    "robust": ll.FusedLinearDPOLoss(loss_type="robust", label_smoothing=0.1),
    "simpo": ll.FusedLinearSimPOLoss(),
}


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_margin_losses_keep_6_for_a_pair_larger_than_the_budget(name):
    loss = MARGIN_LOSSES[name]
    for sequences in (2, 4):
        x, w, labels = inputs(hidden=8, sequences=sequences)
        labels[1 : sequences // 2] = labels[1 + sequences // 2 :] = -100  # a second pair of a few tokens only
        if sequences == 4:
            labels[1, -2:] = labels[3, -2:] = 5
        arguments = {} if name == "simpo" else {"ref_logps": torch.zeros(sequences)}
        with ll.settings(memory_budget=budget_for_rows(10)):
            result = {}

            def step(x=x, w=w, labels=labels, arguments=arguments, result=result) -> None:
                result["out"] = loss(x, w, labels, **arguments)
                result["out"].loss.backward()

            counted = flops(step)
        assert result["out"].plan.steps[0].schedule == "deferred_scale"
        assert counted <= 6.02 * scored(labels) * 8 * V


def test_other_losses_pay_8_for_a_pair_larger_than_the_budget():
    x, w, labels = inputs(hidden=8)
    with ll.settings(memory_budget=budget_for_rows(10)):
        out = ll.FusedLinearORPOLoss()(x, w, labels)
        assert out.plan.schedule == "recompute"
        counted = flops(lambda: ll.FusedLinearORPOLoss()(x, w, labels).loss.backward())
    assert counted == 8 * scored(labels) * 8 * V == out.plan.flops


@pytest.mark.parametrize(("train", "limit"), [("hw", 8), ("w", 6), ("h", 4), ("", 2)])
def test_linear_logps_with_any_loss_behind_it(train, limit):
    x, w, labels = inputs(train)

    def step() -> None:
        logps = ll.linear_logps(x, w, labels).logps
        if train:
            logps.square().sum().backward()

    assert flops(step) == limit * scored(labels) * H * V


@pytest.mark.parametrize("train", ["hw", "h", "w"])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_operators_flop_formula_counts_the_gemms_that_run(train, entropy, monkeypatch):
    """The counter sees registered formulas; here it looks below the operators, at the GEMMs themselves."""
    x, w, labels = inputs(train)

    def step() -> None:
        stats = ll.linear_logps(x, w, labels, outputs=("logps", "entropy"))
        (stats.logps.sum() + (stats.entropy.sum() if entropy else 0)).backward()

    by_formula = flops(step)
    counted = 0

    def counting(implementation):
        def call(*args):
            nonlocal counted
            with FlopCounterMode(display=False) as inner:
                result = implementation(*args)
            counted += inner.get_total_flops()
            return result

        return call

    monkeypatch.setattr(torch.ops.logitless, "logps_forward", counting(op.logps_forward))
    monkeypatch.setattr(torch.ops.logitless, "logps_backward", counting(op.logps_backward))
    with ll.settings(batch_invariant=False):  # the formulas do not count padding rows
        step()
    assert counted == by_formula > 0


@pytest.mark.parametrize("masked", [6, 7, 23])
@pytest.mark.parametrize("train", ["hw", "h", ""])
def test_padding_rows_of_batch_invariance_are_few(train, masked):
    """Up to 15 rows of one GEMM, also where the logits are made in the gradient's tile, without memory for padding."""
    x, w, labels = inputs(train, masked=masked)

    def step() -> None:
        out = ll.FusedLinearSimPOLoss()(x, w, labels)
        if train:
            out.loss.backward()

    padding = flops(step, batch_invariant=None) - flops(step)
    assert 0 <= padding <= 2 * 15 * H * V


LENGTHS = [256, 1024]
VOCAB, HIDDEN, BUDGET = 151_936, 8, 64 << 20


def warm_up() -> None:
    """The first calls of a process allocate what lives for ever."""
    x, w, labels = inputs("hw", 8, HIDDEN, 500, torch.bfloat16, sequences=2)
    ll.FusedLinearDPOLoss()(x, w, labels, ref_logps=torch.zeros(2)).loss.backward()
    ll.linear_logps(x, w, labels).logps.sum().backward()


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("train", ["hw", "h", ""])
def test_extra_memory_of_a_loss_stays_within_the_promise(tokens, train):
    """V = 151936: the logits of 1024 tokens take five budgets in bfloat16. A hidden size of 8 keeps the GEMMs short."""
    x, w, labels = inputs(train, tokens // 2, HIDDEN, VOCAB, torch.bfloat16, sequences=2)
    loss = ll.FusedLinearDPOLoss()
    plans = []

    def step() -> None:
        out = loss(x, w, labels, ref_logps=torch.zeros(2))
        plans.append(out.plan)
        if train:
            out.loss.backward()

    warm_up()
    with ll.settings(memory_budget=BUDGET):
        measured = peak_bytes(step)
    assert measured <= plans[0].extra_bytes + x.numel() * 2  # the plan counts scored tokens; dX has all positions
    promised = BUDGET + x.numel() * 8 + 200 * tokens + (1 << 20)
    if "w" in train:
        promised += VOCAB * HIDDEN * (2 + 4)  # dW, and its accumulator or a single tile in its place
    assert measured <= promised


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("train", ["hw", "h", ""])
def test_extra_memory_of_the_operator_stays_within_the_promise(tokens, train):
    x, w, labels = inputs(train, tokens // 2, HIDDEN, VOCAB, torch.bfloat16, sequences=2)

    def step() -> None:
        logps = ll.linear_logps(x, w, labels).logps
        if train:
            logps.sum().backward()

    warm_up()
    with ll.settings(memory_budget=BUDGET):
        measured = peak_bytes(step)
    assert measured <= BUDGET + x.numel() * 8 + 200 * tokens + (1 << 20) + ("w" in train) * VOCAB * HIDDEN * 2


def test_memory_does_not_grow_with_the_vocabulary_times_tokens():
    """Sixteen times the tokens at a fixed budget: the hidden states' share more, and fixed blocks of 512k elements."""
    vocab, hidden, budget = 32_768, 16, 8 << 20
    measured = []
    for tokens in (128, 2048):
        x, w, labels = inputs("hw", tokens, hidden, vocab, torch.bfloat16, masked=0, sequences=2)
        loss = ll.FusedLinearORPOLoss()

        def step(x=x, w=w, labels=labels, loss=loss) -> None:
            loss(x, w, labels).loss.backward()

        with ll.settings(memory_budget=budget):
            step()
            x.grad = w.grad = None
            measured.append(peak_bytes(step))
    assert measured[1] - measured[0] <= (2048 - 128) * 2 * (hidden * 8 + 200) + (4 << 19)


def test_upstream_scale_needs_no_copy_of_the_weight():
    """A loss divided by the accumulation steps scales the finished dW in place."""
    vocab, hidden = 8192, 256
    x, w, labels = inputs("hw", 32, hidden, vocab, torch.bfloat16, masked=0, sequences=2)
    loss = ll.FusedLinearDPOLoss()

    def step(scale: float) -> None:
        (loss(x, w, labels, ref_logps=torch.zeros(2)).loss * scale).backward()

    with ll.settings(memory_budget=4 << 20):
        step(0.25)
        peaks = []
        for scale in (1.0, 0.25):
            x.grad = w.grad = None
            peaks.append(peak_bytes(lambda scale=scale: step(scale)))
    assert peaks[1] - peaks[0] < vocab * hidden  # half of dW's bytes
