"""The triton backend: gradients of the op and of losses by every schedule, and filtered gradients, against float64."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import logitless as ll
from logitless.kernels.core.dtypes import tile_dtype
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.settings import current_settings
from logitless.kernels.core.stats import OUTPUTS, CoreOptions
from logitless.kernels.tile.head_gradient import HeadGradient

from ..helpers import Case, gradients, make_case, relative_error, run_op, run_reference
from .conftest import DEVICE, replace_in_backend

pytest.importorskip("triton")
from logitless.kernels.backends.triton import backend as triton_backend
from logitless.kernels.backends.triton import tile_gradients
from logitless.kernels.backends.triton.tuning.configs import table

#: NumPy's, in the interpreter.
pytestmark = [
    pytest.mark.blas,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
#: Of logps relative to 1 + |logp|, and of gradients: those of the torch backend's tests.
LIMITS = {torch.float32: (2e-5, 2e-5), torch.float16: (2e-5, 2**-10)}
HEADS = {"plain": HeadSpec(), "softcap": HeadSpec(1.2, 8.0, 0.6)}
TINY, LARGE = 3000, 1 << 30
needs_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="is about what a GPU does, on a CPU")


@pytest.fixture(autouse=True, scope="module")
def backend():
    with ll.settings(backend="triton"):
        yield


@pytest.fixture
def labels_in_tile(monkeypatch):
    """The convention of GPUs."""
    replace_in_backend(monkeypatch, "targets_in_tile", lambda device: True)


@pytest.fixture
def fp16_gemms(monkeypatch):
    """GEMMs take fp16, as a GPU's."""
    replace_in_backend(monkeypatch, "gemm_dtype", lambda dtype, device: dtype)


def wanted(case: Case, train: str) -> list[Tensor]:
    return [t for t, key in ((case.hidden, "h"), (case.weight, "w"), (case.bias, "b")) if key in train]


def check_op(case: Case, train: str, limits: tuple[float, float]) -> None:
    stats, wide = run_op(case, ("logps", "entropy")), case.double()
    reference = run_reference(wide)
    for name in ("logps", "entropy"):
        value, exact = getattr(stats, name), getattr(reference, name)
        assert ((value - exact).abs() / (1 + exact.abs())).max() <= limits[0], name
    c = torch.linspace(-1.5, 1, case.labels.numel(), device=case.labels.device).view(case.labels.shape)
    for of_logps, of_entropy in ((1, 0), (1, 0.5), (0, 1)):
        if train == "b" and not of_entropy:
            continue
        loss, exact = ((of_logps * (r.logps * c).sum() + of_entropy * (r.entropy * c).sum()) for r in (stats, reference))
        loss = loss if of_entropy else (stats.logps * c).sum()
        for mine, true in zip(gradients(loss, case), torch.autograd.grad(exact, wanted(wide, train), retain_graph=True)):
            assert relative_error(mine, true) <= limits[1], (of_logps, of_entropy)


@pytest.mark.parametrize(
    ("train", "budget", "dtype"),
    [
        ("h", TINY, torch.float16),
        ("hw", TINY, torch.float32),
        ("hw", LARGE, torch.float16),
        ("hwb", LARGE, torch.float32),
        ("hwb", TINY, torch.float16),
        ("w", TINY, torch.float16),
        ("b", TINY, torch.float32),
    ],
)
def test_gradients_of_the_op(train, budget, dtype):
    head = HEADS["softcap" if train in ("hw", "b") else "plain"]
    case = make_case(
        sequences=3, tokens=17, hidden=10, vocab=150, dtype=dtype, bias=True, train=train, head=head, scale=0.7
    ).to(DEVICE)
    with ll.settings(memory_budget=budget):
        check_op(case, train, LIMITS[dtype])


@needs_cpu
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, "softcap"), (torch.float16, "plain")])
def test_gradients_with_the_labels_in_the_tile(name, dtype, head, labels_in_tile, request):
    if dtype == torch.float16:
        request.getfixturevalue("fp16_gemms")
    case = make_case(
        sequences=2, tokens=12, hidden=10, vocab=100, dtype=dtype, bias=True, head=HEADS[head], peaked=-10.0, scale=0.7
    )
    with ll.settings(backend=name):
        check_op(case, "hwb", (LIMITS[dtype][0], 3 * LIMITS[dtype][1]))
        check_loss("simpo", case, "hwb", (1e-5, 3 * LIMITS[dtype][1]))


LOSSES = {
    "dpo": ll.FusedLinearDPOLoss(beta=0.3),
    "simpo": ll.FusedLinearSimPOLoss(),
    "orpo": ll.FusedLinearORPOLoss(beta=0.3),
    "kto": ll.FusedLinearKTOLoss(beta=0.3, undesirable_weight=1.4),
}


def check_loss(name: str, case: Case, train: str, limits: tuple[float, float]) -> ll.Plan:
    s = len(case.labels)
    extras = {"ref_logps": torch.linspace(-90, -70, s, device=case.labels.device)} if name in ("dpo", "kto") else {}
    if name == "kto":
        extras |= {"desirable": torch.arange(s, device=case.labels.device) % 2 == 0, "kl": 0.2}
    loss, wide = LOSSES[name], case.double()
    out = loss(case.hidden, case.weight, case.labels, bias=case.bias, head=case.head, **extras)
    with ll.settings(backend="torch", memory_budget=LARGE, grad_filter=0):
        exact = loss(wide.hidden, wide.weight, wide.labels, bias=wide.bias, head=wide.head, **extras)
    assert out.plan.backend == current_settings().backend
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=limits[0])
    for mine, true in zip(gradients(out.loss, case), torch.autograd.grad(exact.loss, wanted(wide, train)), strict=True):
        assert relative_error(mine, true) <= limits[1]
    return out.plan


@pytest.mark.parametrize(
    ("name", "train"),
    [*((name, train) for name in LOSSES for train in ("h", "hwb")), ("dpo", "hw"), ("dpo", "w"), ("orpo", "b")],
)
def test_gradients_of_losses_by_every_schedule(name, train):
    dtype = torch.float16 if (name, train) in (("dpo", "hw"), ("simpo", "hwb"), ("kto", "h")) else torch.float32
    case = make_case(sequences=4, tokens=12, hidden=10, vocab=100, dtype=dtype, bias=True, train=train, scale=0.7).to(DEVICE)
    schedules = set()
    for budget in (LARGE, TINY):
        with ll.settings(memory_budget=budget):
            plan = check_loss(name, case, train, (1e-5, LIMITS[dtype][1]))
        schedules.add(plan.schedule)
    assert train == "h" or len(schedules) == 2


@pytest.mark.parametrize("budget", [LARGE, 100_000])
@pytest.mark.parametrize("train", ["h", "hw"])
def test_gradients_of_rows_that_all_but_rule_out_their_label(train, budget):
    """Rivals in the first, a middle and the last block, by every schedule; other rows are ordinary."""
    case = make_case(sequences=2, tokens=20, hidden=24, vocab=200, scale=0.3, train=train, masked=0.0)
    with torch.no_grad():
        for i, rival in enumerate((1, 100, 199)):
            case.hidden[0, 3 + i] += 200 * case.weight[rival] / case.weight[rival].square().sum()
    case = case.to(DEVICE)
    with ll.settings(memory_budget=budget):
        check_op(case, train, LIMITS[torch.float32])
        check_loss("simpo", case, train, (1e-5, LIMITS[torch.float32][1]))


@pytest.mark.parametrize("train", ["h", "hw"])
@pytest.mark.parametrize("metrics", [False, True])
def test_identical_policy_and_reference_give_exactly_ln_2(train, metrics):
    """Whatever statistics are asked of the policy, and though a frozen head is scored in other blocks than its reference."""
    case = make_case(sequences=2, tokens=20, hidden=24, vocab=330, train=train, scale=1.5).to(DEVICE)
    same = {"ref_hidden": case.hidden.detach(), "ref_weight": case.weight.detach()}
    for budget in (LARGE, 200_000):
        with ll.settings(memory_budget=budget):
            out = ll.FusedLinearDPOLoss(metrics=metrics)(case.hidden, case.weight, case.labels, **same)
        assert out.loss.item() == torch.tensor(math.log(2)).item()


def test_bitwise_repeatable():
    case = make_case(sequences=2, tokens=20, hidden=24, vocab=150, bias=True).to(DEVICE)
    runs = []
    for _ in range(2):
        with ll.settings(memory_budget=20_000, grad_filter=1e-4):
            out = LOSSES["simpo"](case.hidden, case.weight, case.labels, bias=case.bias)
            stats = run_op(case, OUTPUTS)
            runs.append([out.loss, *gradients(out.loss, case), *stats, *gradients(stats.logps.square().sum(), case)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("workspace", "dtype"), [(1, torch.float16), (30_000, torch.float32)])
def test_a_small_workspace_changes_the_blocks_and_not_the_result(workspace, dtype):
    """Chunks of tokens, and blocks of the vocabulary: log-probabilities are the same bits."""
    case = make_case(sequences=1, tokens=40, hidden=17, vocab=300, dtype=dtype, masked=0.0, scale=3.0, bias=True).to(DEVICE)
    given = case.hidden.detach()[0], case.weight.detach(), case.bias.detach(), case.labels[0]
    options = CoreOptions(workspace=workspace)
    roomy, unit = (
        triton_backend.score(*given, HeadSpec(), o, unit_dhidden=True) for o in (CoreOptions(), options)
    )  # fmt: skip
    forward = triton_backend.score(*given, HeadSpec(), options)
    assert (forward.target_offset < -30).any()
    for stats in (roomy, unit):
        for name in ("logps", "k"):
            assert torch.equal(getattr(stats, name), getattr(forward, name)), name
    assert relative_error(unit.unit_dhidden, roomy.unit_dhidden) <= 1e-6
    wide = case.double()
    c = torch.linspace(-1, 1, 40, device=DEVICE)
    expected = torch.autograd.grad((run_reference(wide).logps[0] * c).sum(), (wide.hidden, wide.weight, wide.bias))
    for accumulate in (False, True):
        dhidden = torch.full(given[0].shape, torch.nan, device=DEVICE)
        dhead = HeadGradient(given[1], given[2], need_weight=True, need_bias=True, accumulate=accumulate)
        triton_backend.recompute_gradients(
            *given, forward, c, None, HeadSpec(), options, dhidden=dhidden, head_gradient=dhead
        )  # fmt: skip
        for mine, true in zip((dhidden[None], dhead.weight, dhead.bias), expected, strict=True):
            assert relative_error(mine, true) <= (LIMITS[torch.float32][1] if accumulate else LIMITS[dtype][1])


def test_a_plan_names_the_backend():
    for work in ({"train_weight": False}, {}, {"arbitrary_loss": True}):
        plan = ll.plan(num_tokens=100, hidden_size=64, vocab_size=5000, dtype=torch.float16, device=DEVICE.type, **work)
        assert "triton" in plan.backend and plan.flops > 0 and plan.extra_bytes > 0
    if DEVICE.type == "cpu":
        with pytest.raises(RuntimeError, match="computes nothing in bfloat16"):
            ll.plan(num_tokens=100, hidden_size=64, vocab_size=5000, dtype=torch.bfloat16)


def test_flops_are_counted_as_of_any_backend():
    from torch.utils.flop_counter import FlopCounterMode

    case = make_case(hidden=8, vocab=70, train="hw").to(DEVICE)
    counts = []
    for name in ("triton", "torch"):
        with ll.settings(backend=name, batch_invariant=False), FlopCounterMode(display=False) as counter:
            run_op(case).logps.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 4 * 2 * int((case.labels >= 0).sum()) * case.weight.numel()


# Filtered gradients


class Filtered:
    """Sums of a float64 gradient of the logits without the blocks that a filter leaves out.

    ``gradient`` (N, V) is dLoss / d raw logits; blocks are those of the configuration that the backend uses.
    """

    def __init__(self, case: Case, loss_of) -> None:
        scored = case.labels >= 0
        x, w = case.hidden.detach()[scored].double(), case.weight.detach().double()
        self.x, self.weight, self.labels = x, w, case.labels[scored]
        raw = x @ w.t()
        self.raw = (raw if case.bias is None else raw + case.bias.detach().double()).requires_grad_()
        log_p = case.head.apply(self.raw).log_softmax(dim=-1)
        logps, entropy = log_p.gather(1, self.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)
        (self.gradient,) = torch.autograd.grad(loss_of(logps, entropy), self.raw)
        bits = str(8 * case.hidden.dtype.itemsize)
        self.config = table()["interpreter"][bits][0]
        at_label = torch.zeros_like(self.gradient).scatter(1, self.labels[:, None], 1)
        self.holds_label = self.blocks(at_label).amax(dim=(1, 3)) > 0

    def blocks(self, values: Tensor) -> Tensor:
        """(n_blocks, BLOCK_N, v_blocks, BLOCK_V) of (N, V)."""
        n, v = values.shape
        values = pad(values, (0, -v % self.config.BLOCK_V, 0, -n % self.config.BLOCK_N))
        return values.unflatten(1, (-1, self.config.BLOCK_V)).unflatten(0, (-1, self.config.BLOCK_N))

    def without_labels(self) -> Tensor:
        return self.gradient.scatter(1, self.labels[:, None], 0)

    def threshold(self) -> float:
        """One that the largest entries of half of the blocks without a label reach, and none comes close to."""
        largest = self.blocks(self.without_labels().abs()).amax(dim=(1, 3))[~self.holds_label].sort().values
        places = slice(len(largest) // 4, -(len(largest) // 4))
        widest = (largest[1:] / largest[:-1])[places].argmax() + places.start
        return float((largest[widest] * largest[widest + 1]).sqrt())

    def active(self, grad_filter: float, margin: float = 1e-3) -> Tensor:
        """Which blocks count. None of them may be close to the filter, where rounding decides."""
        largest = self.blocks(self.without_labels().abs()).amax(dim=(1, 3))
        assert not ((largest / grad_filter - 1).abs() < margin)[~self.holds_label].any()
        return (largest >= grad_filter) | self.holds_label

    def sums(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """dX (N, H) and dW (V, H)."""
        keep = active.repeat_interleave(self.config.BLOCK_N, 0).repeat_interleave(self.config.BLOCK_V, 1)
        kept = self.gradient * keep[: len(self.x), : len(self.weight)]
        return kept @ self.weight, kept.t() @ self.x


def filter_case(**changes) -> Case:
    """Half of the tokens are surer than the others, and labels are of the first entries: blocks of all sizes, and without."""
    given = {"sequences": 1, "tokens": 70, "hidden": 16, "vocab": 280, "scale": 0.5, "masked": 0.1, "bias": True} | changes
    case = make_case(**given)
    with torch.no_grad():
        case.hidden[:, 35:] *= 3
    case.labels[case.labels >= 0] %= 100
    return case.to(DEVICE)


@pytest.fixture
def seen(monkeypatch) -> list[Tensor]:
    """Which blocks counted, call by call."""
    found: list[Tensor] = []
    replace_in_backend(monkeypatch, "count_blocks", lambda active: found.append(active != 0))
    return found


COEFFICIENTS = {"logps": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, -0.3)}


@pytest.mark.parametrize(
    ("of", "head", "dtype"),
    [
        ("logps", "plain", torch.float32),
        ("entropy", "plain", torch.float32),
        ("both", "softcap", torch.float32),
        ("both", "plain", torch.float16),
    ],
)
def test_the_backward_pass_of_the_op_leaves_out_what_the_filter_says(of, head, dtype, seen):
    case = filter_case(head=HEADS[head], dtype=dtype)
    of_logps, of_entropy = COEFFICIENTS[of]
    model = Filtered(case, lambda logps, entropy: (of_logps * logps + of_entropy * entropy).mean())
    grad_filter = model.threshold()
    with ll.settings(grad_filter=grad_filter):
        stats = run_op(case, ("logps", "entropy") if of_entropy else ("logps",))
    scored = case.labels >= 0
    loss = of_logps * stats.logps[scored].mean() if of_logps else 0
    loss = loss + of_entropy * stats.entropy[scored].mean() if of_entropy else loss
    dx, dw, db = gradients(loss, case)
    (active,) = seen
    expected = model.active(grad_filter)
    assert torch.equal(active, expected)
    assert 0.1 < expected[~model.holds_label].double().mean() < 0.9
    for mine, true in zip((dx[scored], dw), model.sums(expected), strict=True):
        assert relative_error(mine, true) <= LIMITS[dtype][1]
    assert relative_error(db, model.gradient.sum(dim=0)) <= LIMITS[dtype][1]  # no GEMM, nothing left out


@pytest.mark.parametrize("convention", ["beside", pytest.param("in the tile", marks=needs_cpu)])
@pytest.mark.parametrize(("raised", "dtype"), [(False, torch.float16), (True, torch.float32)])
def test_the_gradients_of_a_tile_leave_out_what_the_filter_says(raised, dtype, convention, seen, request, monkeypatch):
    replace_in_backend(monkeypatch, "VOCAB_BLOCK", 128)
    if convention == "in the tile":
        for name in ("labels_in_tile", *(["fp16_gemms"] if dtype == torch.float16 else [])):
            request.getfixturevalue(name)
    case = filter_case(dtype=dtype, masked=0.0)
    if raised:
        with torch.no_grad():
            for row, rival in ((3, 1), (20, 200), (60, 279)):
                case.hidden[0, row] += 60 * case.weight[rival] / case.weight[rival].square().sum()
    n = case.labels.numel()
    c = torch.linspace(-1, 1, n, device=DEVICE) / n
    model = Filtered(case, lambda logps, entropy: (logps * c).sum())
    x, w, b, labels = case.hidden.detach()[0], case.weight.detach(), case.bias.detach(), case.labels[0]
    limit = 3 * LIMITS[dtype][1] if tile_gradients.gemm_dtype(dtype, DEVICE) == torch.float16 else LIMITS[torch.float32][1]
    threshold = model.threshold()
    for grad_filter, accumulate in ((threshold, True), (threshold, False), (1e-38, True)):
        options = CoreOptions(grad_filter=grad_filter, workspace=30_000)
        tile = torch.full((n, len(w)), torch.nan, dtype=tile_dtype(dtype, DEVICE), device=DEVICE)
        stats = triton_backend.score(x, w, b, labels, HeadSpec(), options, tile=tile)
        dhidden = torch.full(x.shape, torch.nan, device=DEVICE)
        dhead = HeadGradient(w, b, need_weight=True, need_bias=True, accumulate=accumulate)
        given = x, w, labels, tile, stats, c, HeadSpec(), options
        triton_backend.tile_gradients(*given, dhidden=dhidden, head_gradient=dhead)
        expected = model.active(grad_filter)
        assert torch.equal(seen.pop(), expected)
        dx, dw = model.sums(expected)
        assert relative_error(dhidden, dx) <= limit
        assert relative_error(dhead.weight, dw) <= (limit if accumulate else LIMITS[dtype][1] + limit)
        assert relative_error(dhead.bias, model.gradient.sum(dim=0)) <= limit


def test_with_a_soft_cap_a_tile_keeps_all_that_reaches_the_filter(seen):
    """Its bound is of the probabilities, which the slope makes smaller: it may keep more, and never less."""
    case = filter_case(head=HeadSpec(1.0, 6.0, 1.0), masked=0.0, peaked=4.0)
    n = case.labels.numel()
    model, bound = Filtered(case, lambda logps, entropy: logps.mean()), Filtered(case, lambda logps, entropy: logps.mean())
    bound.gradient = case.head.apply(model.raw).softmax(dim=-1).detach() / n
    grad_filter = bound.threshold()
    options = CoreOptions(grad_filter=grad_filter)
    given = case.hidden.detach()[0], case.weight.detach(), case.bias.detach(), case.labels[0]
    tile = torch.empty((n, len(case.weight)), device=DEVICE)
    stats = triton_backend.score(*given, case.head, options, tile=tile)
    c, dhidden = torch.full((n,), 1 / n, device=DEVICE), torch.empty_like(given[0])
    x, w, _, labels = given
    triton_backend.tile_gradients(
        x, w, labels, tile, stats, c, case.head, options, dhidden=dhidden, head_gradient=None
    )  # fmt: skip
    (active,) = seen
    must = model.active(grad_filter)
    assert torch.equal(active, bound.active(grad_filter)) and (active | ~must).all() and not active.all()
    assert relative_error(dhidden, model.sums(active)[0]) <= LIMITS[torch.float32][1]


@pytest.mark.parametrize("budget", [LARGE, 40_000])
def test_losses_err_by_less_than_the_filter_in_each_logit(budget):
    case = make_case(sequences=4, tokens=30, hidden=16, vocab=200, scale=0.5).to(DEVICE)
    case.labels[case.labels >= 0] %= 64
    results = []
    ll.skipped_share()
    largest = 1e-2
    for grad_filter in (0.0, 1e-30, largest):
        with ll.settings(grad_filter=grad_filter, memory_budget=budget):
            out = LOSSES["simpo"](case.hidden, case.weight, case.labels)
        results.append(gradients(out.loss, case))
        share = ll.skipped_share()
        assert (share > 0.05) == (grad_filter == largest), share
    exact, tiny, filtered = results
    for a, b in zip(exact, tiny, strict=True):
        assert relative_error(b, a) <= 1e-6
    difference = (filtered[0] - exact[0]).abs()
    assert difference.max() > 0 and (difference <= largest * case.weight.abs().sum(dim=0) + 1e-9).all()
    bound = largest * case.hidden[case.labels >= 0].abs().sum(dim=0)
    assert ((filtered[1] - exact[1]).abs() <= bound + 1e-9).all()


def test_peaked_logits_skip_most_blocks_and_the_share_is_counted(seen):
    from logitless.kernels.tile.grad_filter import count_blocks

    g = torch.Generator().manual_seed(0)
    w = torch.randn(1280, 64, generator=g)
    labels = torch.randint(64, (1, 64), generator=g)
    x = 30 * w[labels] / w[labels].square().sum(-1, keepdim=True) + 0.1 * torch.randn(1, 64, 64, generator=g)
    case = Case(x.requires_grad_(), w.requires_grad_(), None, labels, HeadSpec()).to(DEVICE)
    ll.skipped_share()
    with ll.settings(grad_filter=1e-5):
        gradients(run_op(case).logps.mean(), case)
    (active,) = seen
    assert active.sum() == 2  # those of the labels
    count_blocks(active)
    assert ll.skipped_share(reset=False) == ll.skipped_share() == 38 / 40
    assert ll.skipped_share() == 0


@pytest.mark.parametrize("use_tile", [False, True])
def test_labels_are_never_left_out(use_tile, seen):
    """Under a filter that nothing reaches, blocks without a label are all that is missing."""
    case = filter_case(bias=False)
    with ll.settings(grad_filter=1e9):
        if use_tile:
            nll = ll.FusedLinearPreferenceLoss(lambda batch: -batch.logps / 70, group="sequence")
            loss = nll(case.hidden, case.weight, case.labels).loss
        else:
            loss = -run_op(case).logps.sum() / 70
        dx, dw = gradients(loss, case)
    model = Filtered(case, lambda logps, entropy: -logps.sum() / 70)
    (active,) = seen
    expected = model.active(1e9)
    assert torch.equal(active, expected) and not expected.all()
    assert relative_error(dx[case.labels >= 0], model.sums(expected)[0]) <= LIMITS[torch.float32][1]
    assert relative_error(dw, model.sums(expected)[1]) <= LIMITS[torch.float32][1]


def test_a_frozen_head_is_not_filtered(seen):
    case = make_case(sequences=4, tokens=9, vocab=150, train="h").to(DEVICE)
    results = []
    for grad_filter in (0.0, 0.5):
        with ll.settings(grad_filter=grad_filter):
            out = LOSSES["simpo"](case.hidden, case.weight, case.labels)
            results.append([*gradients(out.loss, case), *gradients(run_op(case).logps.sum(), case)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not seen


def test_the_filter_holds_in_a_backward_pass_elsewhere(seen):
    """In another thread, under other settings: that of the forward pass counts."""
    case = filter_case(bias=False)
    with ll.settings(grad_filter=1e9):
        loss = run_op(case).logps.mean()
    with ll.settings(backend="torch", grad_filter=0.0):
        here = gradients(loss, case)
        there: list[Tensor] = []
        thread = threading.Thread(target=lambda: there.extend(gradients(loss, case)))
        thread.start()
        thread.join()
    assert len(seen) == 2 and not seen[0].all()
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [-1e-5, math.inf, math.nan, "1e-5", True, None])
def test_a_bad_filter_is_an_error_that_names_it(value):
    before = current_settings()
    if value is None:  # keeps what is set
        with ll.settings(grad_filter=None) as kept:
            assert kept == before
        return
    with pytest.raises((TypeError, ValueError), match="grad_filter must be"), ll.settings(grad_filter=value):
        pass
    assert current_settings() == before


def test_what_cannot_filter_says_so():
    case = make_case(vocab=20).to(DEVICE)
    refusing = [name for name, reasons in ll.available_backends().items() if name != "triton" and not reasons]
    assert "torch" in refusing
    for name in refusing:
        with ll.settings(backend=name, grad_filter=1e-5), pytest.raises(RuntimeError, match=f"{name}: grad_filter=1e-05"):
            run_op(case)
    with ll.settings(grad_filter=1e-5), pytest.raises(RuntimeError, match="triton: grad_filter=1e-05 does not work in float64"):
        run_op(case.double())
