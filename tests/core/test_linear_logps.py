"""The log-prob core against the float64 reference, and the promises that it keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
from logitless.kernels.backends.torch import blockwise as torch_backend
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS, OUTPUTS
from logitless.kernels.tile import rows as scored_rows

from ..conftest import backends
from ..helpers import NAMES_THE_CPU, Case, gradients, make_case, plain_logps, relative_error, run_op, run_reference

EVERY_BACKEND = True

HEADS = [ll.HeadSpec(), ll.HeadSpec(0.7, None, 1.3), ll.HeadSpec(1.2, 8.0, 0.6)]
quick = hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def assert_matches_reference(case: Case, tolerance: float) -> None:
    """All statistics and both gradients; tolerance relative to 1 + |value|, and to the gradient's norm."""
    stats, wide = run_op(case, OUTPUTS), case.double()
    reference = run_reference(wide)
    for name in OUTPUTS:
        value, expected = getattr(stats, name), getattr(reference, name)
        if name == "is_top1":
            assert torch.equal(value, expected)
        else:
            assert ((value.double() - expected).abs() / (1 + expected.abs())).max() <= tolerance, name
    g = torch.Generator().manual_seed(1)
    c, e = torch.randn(case.labels.shape, generator=g), torch.randn(case.labels.shape, generator=g)
    for use_entropy in (False, True):
        loss = (stats.logps * c).sum() + ((stats.entropy * e).sum() if use_entropy else 0)
        expected = (reference.logps * c).sum() + ((reference.entropy * e).sum() if use_entropy else 0)
        for ours, theirs in zip(gradients(loss, case), gradients(expected, wide), strict=True):
            assert relative_error(ours, theirs) <= tolerance


@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("peaked", [0.0, 12.0, -60.0])
def test_float64_is_exact(head, bias, peaked):
    assert_matches_reference(make_case(dtype=torch.float64, head=head, bias=bias, peaked=peaked), 1e-12)


@pytest.mark.parametrize("head", HEADS, ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("peaked", [0.0, 12.0, -60.0, -200.0])
def test_float32_loses_only_rounding(head, peaked):
    assert_matches_reference(make_case(head=head, bias=True, peaked=peaked, vocab=997), 2e-5)


def test_float16_inputs_lose_only_rounding():
    case = make_case(dtype=torch.float16, vocab=997, peaked=5.0)
    stats, wide = run_op(case), case.double()
    reference = run_reference(wide)
    assert ((stats.logps - reference.logps).abs() / (1 + reference.logps.abs())).max() < 1e-5
    loss, expected = stats.logps.sum(), reference.logps.sum()
    for ours, theirs in zip(gradients(loss, case), gradients(expected, wide), strict=True):
        assert relative_error(ours, theirs) < 2**-10


@pytest.mark.parametrize(
    ("scale", "peaked", "gain"),
    [(0.05, 0.0, 10.0), (0.05, 12.0, 10.0), (1.0, 8.0, 1.0)],
    ids=["untrained", "sure of the target", "a few rivals"],
)
def test_bfloat16_is_no_worse_than_plain_pytorch(scale, peaked, gain):
    """Logits that a CPU GEMM rounds cost little where many add up; where a few rivals decide, what plain PyTorch loses."""
    case, plain_case = (
        make_case(dtype=torch.bfloat16, hidden=64, vocab=4099, tokens=33, peaked=peaked, scale=scale) for _ in range(2)
    )
    wide = case.double()
    ours, plain, reference = run_op(case).logps, plain_logps(plain_case), run_reference(wide).logps
    scored = case.labels != -100
    error = (ours.double() - reference)[scored].abs().max()
    assert gain * error <= (plain.double() - reference)[scored].abs().max()
    expected = gradients(reference.sum(), wide)
    for mine, its, true in zip(gradients(ours.sum(), case), gradients(plain.sum(), plain_case), expected, strict=True):
        assert relative_error(mine, true) < 1.5 * relative_error(its, true)


def test_a_confident_target_keeps_full_precision():
    """1 - p and the target's gradient are exact where a read-modify-write of p - 1 would lose every digit."""
    case = make_case(peaked=25.0, masked=0.0)
    wide = case.double()
    logps, reference = run_op(case).logps, run_reference(wide).logps
    assert (logps <= 0).all()
    assert -1e-2 < reference.median() < 0
    assert (reference != 0).all()
    assert ((logps.double() - reference).abs() / reference.abs()).max() < 1e-4
    (dx, *_), (expected, *_) = gradients(logps.sum(), case), gradients(reference.sum(), wide)
    assert (((dx.double() - expected).norm(dim=-1)) / expected.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize(
    "sure_of",
    [
        "the label",
        "another",
    ],
)
def test_log_sum_sq_probs_of_a_sure_model_is_no_worse_than_plain_pytorch(sure_of):
    """One entry leads by 6 to 40 nats, and ``log(sum p^2)`` is close to 0: relatively exact if that entry is the label."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(64)
    z = torch.randn(64, 1009, generator=g)
    labels = torch.randint(1009, (64,), generator=g)
    leader = labels if sure_of == "the label" else (labels + 1) % 1009
    z[rows, leader] = z.amax(dim=1) + torch.linspace(6, 40, 64)
    # hidden states of the unit matrix: the logits are the weight's entries, without a rounding
    ours = ll.linear_logps(torch.eye(64), z.t().contiguous(), labels, outputs="log_sum_sq_probs").log_sum_sq_probs
    plain = (z.softmax(dim=-1) ** 2).sum(dim=-1).log()
    p = z.double().softmax(dim=-1)
    top, at = p.max(dim=-1)
    rest = p.scatter(1, at[:, None], 0)
    expected = torch.log1p(rest.square().sum(-1) - rest.sum(-1) * (1 + top))  # 1 - top^2 = (1 - top) (1 + top)
    assert (ours.double() - expected).abs().max() <= (plain.double() - expected).abs().max()
    assert (ours <= 0).all()
    if sure_of == "the label":
        assert ((ours.double() - expected) / expected).abs().max() < 1e-5


@pytest.mark.parametrize("gap", [40.0, 90.0, 1000.0, 30000.0])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("train", ["h", "hwb"])
def test_a_target_all_but_ruled_out_is_exact(gap, blocks, train, monkeypatch):
    """Gaps beyond exp's range, in the first, a middle or the last block of the vocabulary, beside ordinary rows."""
    if blocks > 1:
        shrink_blocks(monkeypatch, 8)
    vocab = 21
    x = torch.eye(6, dtype=torch.float32) * 1.0
    w = torch.randn(vocab, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 20, 10, 0, 5, 7])
    for row, rival in zip((0, 1, 2, 3), (20, 0, 4, 12), strict=True):
        w[rival, row] = w[labels[row], row] + gap
    case = Case(
        x.requires_grad_(), w.requires_grad_("w" in train), torch.zeros(vocab).requires_grad_("b" in train), labels, HEADS[0]
    )
    stats, wide = run_op(case, OUTPUTS), case.double()
    reference = run_reference(wide)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        value, expected = getattr(stats, name), getattr(reference, name)
        assert torch.isfinite(value).all()
        assert ((value - expected).abs() / (1 + expected.abs())).max() < 1e-6, name
    wide_leaves = [t for t, kept in ((wide.hidden, "h"), (wide.weight, "w"), (wide.bias, "b")) if kept in train]
    expected = torch.autograd.grad(reference.logps.sum() + reference.entropy.sum(), wide_leaves)
    for ours, theirs in zip(gradients(stats.logps.sum() + stats.entropy.sum(), case), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def shrink_blocks(monkeypatch, width: int) -> None:
    """Make blocks of the vocabulary that small, so that a small test has many."""
    from logitless.kernels.core import blocking

    monkeypatch.setattr(blocking, "VOCAB_BLOCK", width)
    monkeypatch.setattr(torch_backend, "VOCAB_BLOCK", width)


def test_masked_vocabulary_entries_are_ordinary():
    case = make_case(bias=True, vocab=50, dtype=torch.float64)
    with torch.no_grad():
        case.bias[40:] = -torch.inf
        case.labels[case.labels >= 40] = 3
    stats = run_op(case, ("logps", "entropy", "log_sum_sq_probs", "is_top1"))
    wide = case.double()
    reference = run_reference(wide)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        assert torch.allclose(getattr(stats, name), getattr(reference, name), atol=1e-12)
    dx, dw, db = gradients(stats.logps.sum(), case)
    ex, ew, _ = gradients(reference.logps.sum(), wide)
    assert torch.allclose(dx, ex) and torch.allclose(dw, ew)
    assert (db[40:] == 0).all()


@quick
@given(
    sequences=st.integers(1, 3),
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 33),
    vocab=st.integers(1, 300),
    budget=st.integers(1, 60_000),
    bias=st.booleans(),
    head=st.sampled_from(HEADS),
    peaked=st.sampled_from([0.0, 20.0, -50.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
    train=st.sampled_from(["h", "w", "b", "hw", "hb", "wb", "hwb"]),
    seed=st.integers(0, 5),
)
def test_any_shape_mask_budget_and_trainable_set(
    sequences, tokens, hidden, vocab, budget, bias, head, peaked, masked, train, seed
):
    if not bias:
        train = train.replace("b", "") or "h"
    case = make_case(
        sequences=sequences,
        tokens=tokens,
        hidden=hidden,
        vocab=vocab,
        bias=bias,
        head=head,
        peaked=peaked,
        masked=masked,
        dtype=torch.float64,
        seed=seed,
        train=train,
    )
    with ll.settings(memory_budget=budget):
        stats = run_op(case)
        ours = gradients((stats.logps * 1.5).sum(), case)
    wide = case.double()
    reference = run_reference(wide)
    assert torch.allclose(stats.logps, reference.logps, rtol=1e-10, atol=1e-10)
    everything = dict(zip("hwb", (wide.hidden, wide.weight, wide.bias), strict=True))
    wanted = [everything[k] for k in "hwb" if k in train]
    expected = torch.autograd.grad((reference.logps * 1.5).sum(), wanted, allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-8)


def test_same_result_for_any_budget_in_float32():
    case = make_case(vocab=2000, tokens=50, hidden=32)
    results = []
    for budget in (20_000, 200_000, 1 << 30):
        with ll.settings(memory_budget=budget):
            logps = run_op(case).logps
            results.append([logps, *gradients(logps.sum(), case)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) < 1e-6


def test_a_token_does_not_depend_on_its_neighbours_or_padding():
    case = make_case(sequences=4, tokens=9, masked=0.0, dtype=torch.float64, exact=True)
    full = run_op(case).logps
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(run_op(Case(case.hidden[order], case.weight, None, case.labels[order], case.head)).logps, full[order])
    padded = torch.cat((case.hidden, torch.full_like(case.hidden[:, :3], torch.nan)), dim=1)
    labels = torch.cat((case.labels, torch.full_like(case.labels[:, :3], -100)), dim=1)
    assert torch.allclose(run_op(Case(padded, case.weight, None, labels, case.head)).logps[:, :9], full, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("train", ["h", "hw"])
def test_ignored_positions_change_nothing(value, train):
    case = make_case(train=train)
    poisoned = make_case(train=train)
    ignored = case.labels == -100
    with torch.no_grad():
        poisoned.hidden[ignored] = value
    clean, dirty = run_op(case, OUTPUTS), run_op(poisoned, OUTPUTS)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (a[ignored] == 0).all()
    for a, b in zip(gradients(clean.logps.sum(), case), gradients(dirty.logps.sum(), poisoned), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("train", ["", "h", "w", "b", "hw", "hb", "wb", "hwb"])
def test_frozen_tensors_get_no_gradient(train):
    case, full = make_case(bias=True, train=train), make_case(bias=True)
    logps = run_op(case).logps
    assert logps.requires_grad == bool(train)
    if not train:
        return
    (2 * logps).sum().backward()
    (2 * run_op(full).logps).sum().backward()
    for key, mine, its in zip("hwb", (case.hidden, case.weight, case.bias), (full.hidden, full.weight, full.bias), strict=True):
        if key in train:
            assert torch.allclose(mine.grad, its.grad, rtol=1e-5, atol=1e-6)
        else:
            assert mine.grad is None


@pytest.mark.parametrize("train", ["h", "hw"])
def test_any_upstream_gradient(train):
    case = make_case(train=train, dtype=torch.float64)
    logps = run_op(case).logps
    base = torch.autograd.grad(logps, case.leaves, torch.ones_like(logps), retain_graph=True)
    expanded = torch.autograd.grad(logps, case.leaves, torch.ones(()).double().expand_as(logps), retain_graph=True)
    scaled = torch.autograd.grad(logps, case.leaves, torch.full_like(logps, 65536.0), retain_graph=True)
    strided = torch.ones(*logps.shape, 2, dtype=torch.float64)[..., 0]
    non_contiguous = torch.autograd.grad(logps, case.leaves, strided, retain_graph=True)
    again = torch.autograd.grad(logps, case.leaves, torch.ones_like(logps))
    for b, e, s, n, a in zip(base, expanded, scaled, non_contiguous, again, strict=True):
        assert torch.equal(b, e) and torch.equal(b, n) and torch.equal(b, a)
        assert torch.allclose(s, 65536 * b, rtol=1e-12)


def test_non_contiguous_and_int32_inputs():
    case = make_case(dtype=torch.float64)
    expected = run_op(case).logps
    x = case.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
    w = torch.stack((case.weight.detach(),) * 2, dim=-1)[..., 0]
    labels = case.labels.int().t().contiguous().t()
    assert not x.is_contiguous() and not w.is_contiguous()
    x.requires_grad_()
    w.requires_grad_()
    logps = ll.linear_logps(x, w, labels).logps
    assert torch.allclose(logps, expected, rtol=1e-14, atol=1e-13)
    logps.sum().backward()
    expected.sum().backward()
    assert torch.allclose(x.grad, case.hidden.grad, atol=1e-13) and torch.allclose(w.grad, case.weight.grad, atol=1e-13)


@pytest.mark.cpu_only(NAMES_THE_CPU)
def test_autocast_computes_in_its_dtype_and_keeps_gradient_dtypes():
    case = make_case(hidden=64, vocab=500)
    with torch.autocast("cpu", torch.bfloat16):
        logps = run_op(case).logps
    low = Case(case.hidden.detach().bfloat16(), case.weight.detach().bfloat16(), None, case.labels, case.head)
    assert torch.equal(logps, run_op(low).logps)
    assert logps.dtype == torch.float32
    dx, dw = gradients(logps.sum(), case)
    assert dx.dtype == dw.dtype == torch.float32
    wide = case.double()
    for ours, theirs in zip((dx, dw), gradients(run_reference(wide).logps.sum(), wide), strict=True):
        assert relative_error(ours, theirs) < 0.02


@pytest.mark.parametrize("empty", ["no positions", "all ignored"])
@pytest.mark.parametrize("train", ["h", "hwb"])
def test_nothing_to_score_is_a_differentiable_zero(empty, train):
    case = make_case(bias=True, train=train, tokens=0 if empty == "no positions" else 4, masked=1.0)
    stats = run_op(case, OUTPUTS)
    assert all((value == 0).all() for value in stats)
    for gradient in gradients(stats.logps.sum() + stats.entropy.sum(), case):
        assert (gradient == 0).all()


def test_vocabulary_beyond_17_bits_and_a_hidden_size_of_odd_primes():
    case = make_case(sequences=2, tokens=3, hidden=37, vocab=131_101)
    assert_matches_reference(case, 2e-5)


def test_more_logits_than_31_bits_can_count(backend):
    """N * V > 2^31 scored logits in one tile: all of dX and dW are right. Rows repeat, so the reference is small."""
    if backend == "torch" and "cpu" in backends():
        pytest.skip("addresses are computed by compiled kernels; those of torch's own operators take minutes")
    g = torch.Generator().manual_seed(0)
    n, vocab, distinct = 36_000, 60_000, 1_200
    assert n * vocab > 2**31
    few, w = torch.randn(distinct, 2, generator=g).bfloat16(), torch.randn(vocab, 2, generator=g).bfloat16()
    labels = torch.randint(vocab, (n,), generator=g)
    x = few.repeat(n // distinct, 1).requires_grad_()
    w.requires_grad_()
    nll = ll.FusedLinearPreferenceLoss(lambda batch: -batch.logps, group="sequence")
    with ll.settings(memory_budget=6 << 30):
        out = nll(x, w, labels, cu_seqlens=torch.tensor([0, n]))
    assert len(out.plan.steps) == 1
    out.loss.backward()
    rows, heads = few.double(), w.detach().double()
    logits = rows @ heads.t()
    p = logits.softmax(dim=1)
    normaliser = logits.logsumexp(dim=1).repeat(n // distinct)
    target = (x.detach().double() * heads[labels]).sum(dim=1)
    assert out.loss.item() == pytest.approx((normaliser - target).sum().item(), rel=1e-5)
    assert relative_error(x.grad, (p @ heads).repeat(n // distinct, 1) - heads[labels]) < 2**-8
    assert relative_error(x.grad[-2:], (p @ heads)[-2:] - heads[labels[-2:]]) < 2**-8
    dw = (n // distinct) * (p.t() @ rows)
    dw.index_add_(0, labels, x.detach().double(), alpha=-1)
    assert relative_error(w.grad, dw) < 2**-7
    assert relative_error(w.grad[-2:], dw[-2:]) < 2**-7


@pytest.mark.parametrize("outputs", [("logps",), ("entropy",), ("mean_logits",), ("is_top1",), ("log_sum_sq_probs",)])
def test_only_what_is_asked_for_comes_back(outputs):
    stats = run_op(make_case(), outputs)
    assert [name for name, value in zip(stats._fields, stats, strict=True) if value is not None] == list(outputs)


def test_top1_gives_a_tie_to_the_first_index():
    x = torch.ones(3, 1)
    w = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    assert ll.linear_logps(x, w, torch.tensor([1, 2, 0]), outputs="is_top1").is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top1_ties_of_equal_rows_go_to_the_first_in_any_block(dtype, monkeypatch):
    """The target is compared as the GEMM made it, like all others. The sums are exact, so equal rows of the weight tie."""
    shrink_blocks(monkeypatch, 16)
    g = torch.Generator().manual_seed(0)
    w = torch.randint(-4, 5, (50, 64), generator=g) / 8
    w[[7, 40]] = w[3].clone()
    x = (torch.randint(-8, 9, (400, 64), generator=g) / 8 + 5 * w[3]).to(dtype)
    w = w.to(dtype)
    top = (x.double() @ w.double().t()).topk(4, dim=-1)
    assert (top.values[:, 0] - top.values[:, 3] > 1).all() and torch.isin(top.indices[:, 0], torch.tensor([3, 7, 40])).all()
    assert (top.values[:, 0] != top.values[:, 0].bfloat16()).sum() > 200
    exact = torch.mm
    for gemm in (exact, lambda *args, **kwargs: exact(*args, **kwargs).mul_(1 + 2**-10)):  # as made by one that rounds up
        monkeypatch.setattr(torch, "mm", gemm)
        for label, expected in ((3, True), (7, False), (40, False)):
            is_top1 = ll.linear_logps(x, w, torch.full((400,), label), outputs="is_top1").is_top1
            assert (is_top1 == expected).all()


def test_match_precision_rounds_the_logits_as_the_model_does():
    case = make_case(dtype=torch.bfloat16, hidden=64, vocab=1000)
    with ll.settings(precision="match"):
        ours = run_op(case).logps
    plain = plain_logps(case)
    assert (ours - plain).abs().max() < 2e-5 * (1 + plain.abs().max())


def test_float32_precision_never_rounds_the_logits():
    case = make_case(dtype=torch.bfloat16, hidden=64, vocab=1000, peaked=-8.0)
    with ll.settings(precision="float32"):
        ours = run_op(case).logps
    reference = run_reference(case.double()).logps
    assert ((ours - reference).abs() / (1 + reference.abs())).max() < 2e-6


@pytest.mark.cpu_only("runs a GPU's code path on a CPU")
def test_fp16_gradient_tiles_survive_where_gemms_take_fp16(monkeypatch):
    """A GPU's fp16 GEMMs need normalised tiles; the same code runs here with its CPU shortcut switched off."""
    monkeypatch.setattr(torch_backend, "gemm_dtype", lambda dtype, device: dtype)
    for head in HEADS:
        case = make_case(dtype=torch.float16, vocab=300, hidden=32, peaked=-10.0, bias=True, head=head)
        stats, wide = run_op(case, ("logps", "entropy")), case.double()
        reference = run_reference(wide)
        for use_entropy in (False, True):
            loss = stats.logps.sum() + (stats.entropy.sum() if use_entropy else 0)
            expected = reference.logps.sum() + (reference.entropy.sum() if use_entropy else 0)
            for ours, theirs in zip(gradients(loss, case), gradients(expected, wide), strict=True):
                assert relative_error(ours, theirs) < 3 * 2**-10
        frozen = Case(case.hidden, case.weight.detach(), None, case.labels, head)
        wide = frozen.double()
        (dx,) = gradients(run_op(frozen).logps.sum(), frozen)
        assert relative_error(dx, gradients(run_reference(wide).logps.sum(), wide)[0]) < 3 * 2**-10


@pytest.mark.parametrize("masked", ["some", "all", "no positions"])
@pytest.mark.parametrize("train", ["h", "w", "hwb"])
@pytest.mark.parametrize("use_entropy", [False, True])
def test_what_a_cuda_graph_captures_is_the_same_and_asks_no_label(train, use_entropy, masked, monkeypatch):
    """Made to think on any device that it is captured; tests/gpu captures it."""
    case = make_case(bias=True, train=train, masked=0.4)
    with torch.no_grad():
        case.bias[0] = -float("inf")  # what stands in for an ignored label must not be ruled out
        case.labels.masked_fill_(case.labels == 0, 1)
        if masked == "all":
            case.labels.fill_(-100)
        case.hidden[case.labels == -100] = float("nan")
    if masked == "no positions":
        case = replace(case, hidden=case.hidden[:0].detach().requires_grad_("h" in train), labels=case.labels[:0])

    def run() -> list[torch.Tensor]:
        stats = run_op(case, OUTPUTS)
        loss = (stats.logps * 1.5).sum() + (stats.entropy.sum() if use_entropy else 0)
        return [*(getattr(stats, name) for name in OUTPUTS), *gradients(loss, case)]

    expected = run()
    monkeypatch.setattr(scored_rows, "capturing", lambda labels: True)
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        found = run()
    assert "aten.sum.default" in seen and not any("nonzero" in name for name in seen)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_a_backward_pass_alone_cannot_be_captured_for_a_frozen_head(monkeypatch):
    case = make_case(train="h", masked=0.4)
    logps = run_op(case).logps
    monkeypatch.setattr(scored_rows, "capturing", lambda labels: True)
    with pytest.raises(RuntimeError, match="ran outside of the CUDA graph"):
        logps.sum().backward()


def test_bitwise_repeatable():
    case = make_case(dtype=torch.bfloat16, vocab=3000, hidden=64, tokens=40)
    runs = []
    for _ in range(3):
        logps = run_op(case).logps
        runs.append([logps, *gradients(logps.sum(), case)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_gradcheck_in_float64():
    for head in HEADS:
        case = make_case(sequences=2, tokens=2, hidden=3, vocab=7, bias=True, dtype=torch.float64, head=head, masked=0.2)

        def f(x, w, b, case=case, head=head):
            stats = ll.linear_logps(x, w, case.labels, b, head, ("logps", "entropy"))
            return stats.logps, stats.entropy

        assert torch.autograd.gradcheck(f, (case.hidden, case.weight, case.bias))
        frozen = make_case(sequences=2, tokens=2, hidden=3, vocab=7, dtype=torch.float64, head=head, train="h")
        assert torch.autograd.gradcheck(
            lambda x, f=frozen, head=head: ll.linear_logps(x, f.weight, f.labels, None, head).logps, (frozen.hidden,)
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sequence_logps(packed, reduction, weighted):
    case = make_case(dtype=torch.float64)
    case.labels[1] = -100
    weights = torch.rand(case.labels.shape, dtype=torch.float64) if weighted else None
    reference = run_reference(case.double()).logps
    scored = case.labels != -100
    expected = (reference * (1 if weights is None else weights)).sum(-1)
    if reduction == "mean":
        expected = expected / scored.sum(-1).clamp(min=1)
    if packed:
        s, t = case.labels.shape
        got = ll.sequence_logps(
            case.hidden.reshape(s * t, -1),
            case.weight,
            case.labels.reshape(-1),
            reduction=reduction,
            cu_seqlens=torch.arange(0, s * t + 1, t, dtype=torch.int32),
            token_weights=None if weights is None else weights.reshape(-1),
        )
    else:
        got = ll.sequence_logps(case.hidden, case.weight, case.labels, reduction=reduction, token_weights=weights)
    assert torch.allclose(got, expected, atol=1e-12)
    assert got[1] == 0


def test_optional_outputs_are_all_reported():
    assert set(OPTIONAL_OUTPUTS) | {"logps"} == set(OUTPUTS) == set(ll.TokenStats._fields)


@pytest.mark.parametrize("train", ["h", "hw"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_default_device_elsewhere_changes_nothing(train, packed):
    """As under ``torch.set_default_device``; on ``"meta"``, a tensor that does not say its device has no numbers."""
    results = []
    for default in ("cpu", "meta"):
        case = make_case(train=train)
        bounds = torch.tensor([0, 7, 14, 20, 28])
        with torch.device(default):
            if packed:
                logps = ll.sequence_logps(case.hidden.flatten(0, 1), case.weight, case.labels.flatten(), cu_seqlens=bounds)
            else:
                logps = run_op(case, OUTPUTS).logps
            results.append([logps, *gradients(logps.sum(), case)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
