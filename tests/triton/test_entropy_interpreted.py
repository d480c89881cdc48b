"""The entropy's gradient from a finished tile: the kernel, and policy losses on the triton backend, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.kernels.backends.torch.entropy import mix_tile_
from logitless.kernels.core.dtypes import tile_dtype
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.stats import CoreOptions
from logitless.kernels.tile.head_gradient import HeadGradient

from ..helpers import Case, gradients, make_case, relative_error, run_reference
from ..native.emulated import beside_is_untouched, matrix
from .conftest import DEVICE, moved, replace_in_backend
from .test_backend_interpreted import LARGE, LIMITS, TINY, Filtered, filter_case, wanted

pytest.importorskip("triton")
from logitless.kernels.backends.triton import backend as triton_backend
from logitless.kernels.backends.triton import entropy, tile_gradients
from logitless.kernels.backends.triton.elementwise import TRITON_PASSES

#: NumPy's, in the interpreter.
pytestmark = [
    pytest.mark.blas,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
CAPPED = HeadSpec(1.2, 8.0, 0.6)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def backend():
    with ll.settings(backend="triton"):
        yield


@pytest.fixture
def by_the_kernel(monkeypatch) -> list[int]:
    """Tiles are mixed by the kernel, as on a GPU, and the labels' entries are in them. Counts its calls."""
    calls: list[int] = []

    def mix(tile: Tensor, *args, **kwargs) -> None:
        calls.append(len(tile))
        entropy.mix_tile_(tile, *args, **kwargs)

    replace_in_backend(monkeypatch, "TRITON_PASSES", replace(TRITON_PASSES, mix_tile_=mix))
    replace_in_backend(monkeypatch, "targets_in_tile", lambda device: True)
    return calls


# The kernel


def some_tile(
    rows: int, columns: int, dtype: torch.dtype, head: HeadSpec, *, pad: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of logits that the soft-cap allows, some of them 0; mix (2, N) and k (N,)."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    cap = 30.0 if head.softcap is None else 0.99 * head.softcap / head.temperature
    z = cap * (2 * torch.rand(rows, columns, generator=g, dtype=torch.float64) - 1)
    k = 0.6 * cap * (2 * torch.rand(rows, generator=g, dtype=torch.float64) - 1)
    e = (z - k[:, None]).exp().masked_fill(torch.rand(rows, columns, generator=g) < 0.2, 0.0)
    tile = matrix(rows, columns, dtype, pad=pad, values=e)
    mix = torch.randn(2, rows, generator=g, dtype=torch.float64).to(acc)
    return moved(tile), moved(mix), moved(k.to(acc))


def expected_tile(tile: Tensor, mix: Tensor, k: Tensor, head: HeadSpec) -> tuple[Tensor, Tensor]:
    """``e (mix[0] + mix[1] log e) (1 - tanh^2)``, and the size of what is rounded on the way."""
    e, constant, linear = tile.double(), *mix.double()[:, :, None]
    d = torch.where(e > 0, e, 1).log()
    t = torch.zeros_like(d) if head.softcap is None else (d + k.double()[:, None]) * head.temperature / head.softcap
    sizes = e * (constant.abs() + linear.abs() * (1 + d.abs()))
    if head.softcap is not None:  # a logit's rounding moves its slope by more than the slope's own
        sizes = sizes * (1 - t.square() + 2 * t.abs() * (1 + (d.abs() + k.double().abs()[:, None]) / head.softcap))
    return e * (constant + linear * d) * (1 - t.square()), sizes


def check_mixed(tile: Tensor, mix: Tensor, k: Tensor, head: HeadSpec) -> None:
    before = tile.clone()
    exact, sizes = expected_tile(before, mix, k, head)
    entropy.mix_tile_(tile, mix, k, head, CoreOptions())
    acc = torch.finfo(k.dtype).eps
    bound = 4 * acc * sizes + torch.finfo(tile.dtype).eps * exact.abs()
    assert ((tile.double() - exact).abs() <= bound + torch.finfo(tile.dtype).tiny).all()
    assert (tile[before == 0] == 0).all()
    assert (before == 0).any() or before.numel() < 50


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("head", [HeadSpec(), CAPPED, HeadSpec(0.3, 30.0)], ids=["plain", "softcap", "wide softcap"])
@pytest.mark.parametrize("columns", [1, 37, entropy.BLOCK - 1, entropy.BLOCK, entropy.BLOCK + 1, 2 * entropy.BLOCK + 57])
def test_a_mixed_tile_of_any_width(dtype, head, columns):
    check_mixed(*some_tile(3, columns, dtype, head), head)


@pytest.mark.parametrize("head", [HeadSpec(), CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("pad", [1, 5, 64])
def test_rows_of_any_stride_and_nothing_beside_them(head, pad):
    tile, mix, k = some_tile(5, 131, torch.float32, head, pad=pad)
    assert tile.stride(0) == 131 + pad
    check_mixed(tile, mix, k, head)
    assert beside_is_untouched(tile)


def test_mix_and_offsets_of_any_stride_and_type():
    tile, mix, k = some_tile(6, 70, torch.float32, CAPPED)
    same = tile.clone()
    entropy.mix_tile_(same, mix, k, CAPPED, CoreOptions())
    wide = torch.stack((mix, mix), dim=2).double()[:, :, 1]
    entropy.mix_tile_(tile, wide, torch.stack((k, k), dim=1)[:, 0], CAPPED, CoreOptions())
    assert torch.equal(tile, same)


def test_a_transposed_tile_is_an_error():
    tile, mix, k = some_tile(3, 5, torch.float32, CAPPED)
    with pytest.raises(ValueError, match="transposed must be False"):
        entropy.mix_tile_(tile.t(), mix, k, CAPPED, CoreOptions(), transposed=True)


@pytest.mark.parametrize("shape", [(0, 7), (4, 0), (0, 0)])
def test_an_empty_tile_is_left_alone(shape):
    tile = torch.empty(shape, device=DEVICE)
    mix, k = torch.ones(2, shape[0], device=DEVICE), torch.zeros(shape[0], device=DEVICE)
    entropy.mix_tile_(tile, mix, k, HeadSpec(), CoreOptions())
    assert tile.shape == shape


@pytest.mark.parametrize("head", [HeadSpec(), CAPPED], ids=["plain", "softcap"])
def test_the_smallest_exponentials_and_those_that_underflow(head):
    """A row of normal, subnormal and zero entries: finite, and 0 where it was 0."""
    values = [1e-30, 1e-37, 1.2e-38, 1e-40, 0.0, 1.0, math.exp(-1), 3e4]
    tile = torch.tensor([values, values[::-1]], device=DEVICE)
    mix = torch.tensor([[0.5, -2.0], [1.5, 3.0]], device=DEVICE)
    before = tile.clone()
    entropy.mix_tile_(tile, mix, torch.zeros(2, device=DEVICE), head, CoreOptions())
    assert torch.isfinite(tile).all()
    assert ((tile == 0) >= (before == 0)).all()
    exact, sizes = expected_tile(before, mix, torch.zeros(2, device=DEVICE), head)
    normal = (before > 1e-36) & (exact.abs() < 1e30)
    if head.softcap is None:
        assert ((tile.double() - exact).abs() <= 4 * 2.0**-23 * sizes + 1e-38)[normal].all()


@pytest.mark.parametrize("head", [HeadSpec(), CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_kernel_and_plain_torch_agree(head, dtype):
    tile, mix, k = some_tile(9, 300, dtype, head)
    same = tile.clone()
    entropy.mix_tile_(tile, mix, k, head, CoreOptions())
    with ll.settings(backend="torch"):
        mix_tile_(same, mix, k, head, CoreOptions(cache_elements=1000))
    assert relative_error(tile, same) <= 8 * torch.finfo(dtype).eps


def test_an_entry_at_the_soft_cap_has_no_slope():
    """Rounding may put a logit a little beyond the cap: its slope is then 0, and not negative."""
    k = torch.tensor([8.0 / 0.6], device=DEVICE)
    tile = torch.full((1, 5), 1.0 + 2.0**-20, device=DEVICE)
    entropy.mix_tile_(tile, torch.ones(2, 1, device=DEVICE), k, CAPPED, CoreOptions())
    assert (tile == 0).all()


# The backend.

LOSSES = {
    "ppo": ll.FusedLinearPPOLoss(entropy_coef=0.3, dual_clip=3.0),
    "gspo": ll.FusedLinearGRPOLoss(importance_sampling_level="sequence", entropy_coef=0.3),
    "entropy": ll.FusedLinearPolicyLoss(lambda t: t.entropies.square(), entropy_gradient=True),
}


def check_loss(name: str, case: Case, train: str, limit: float) -> ll.Plan:
    s, wide = len(case.labels), case.double()
    g = torch.Generator().manual_seed(0)
    noise = torch.tensor([-0.8, 0.0, 0.6, 1.6])[torch.randint(4, case.labels.shape, generator=g)].to(DEVICE)
    with torch.no_grad():
        old = run_reference(wide).logps + noise
    given = {"advantages": torch.linspace(-1, 1.5, s, device=DEVICE), "old_logps": old}
    out = LOSSES[name](case.hidden, case.weight, case.labels, case.bias, case.head, **given)
    with ll.settings(backend="torch", memory_budget=LARGE):
        exact = LOSSES[name](wide.hidden, wide.weight, wide.labels, wide.bias, wide.head, **given)
    assert out.plan.backend == "triton"
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5, abs=1e-6)
    assert relative_error(out.entropies, exact.entropies) <= 4e-6
    for mine, true in zip(gradients(out.loss, case), torch.autograd.grad(exact.loss, wanted(wide, train)), strict=True):
        assert relative_error(mine, true) <= limit
    return out.plan


@pytest.mark.parametrize(
    ("name", "train", "dtype", "head"),
    [
        ("ppo", "h", torch.float32, HeadSpec()),
        ("ppo", "hwb", torch.float16, HeadSpec()),
        ("ppo", "hw", torch.float64, HeadSpec()),
        ("gspo", "hwb", torch.float32, HeadSpec()),
        ("entropy", "h", torch.float16, HeadSpec()),
        ("entropy", "hwb", torch.float32, HeadSpec()),
        ("ppo", "hwb", torch.float32, CAPPED),
        ("ppo", "h", torch.float16, CAPPED),
        ("entropy", "hwb", torch.float64, CAPPED),
    ],
    ids=str,
)
def test_gradients_of_losses_with_an_entropy(name, train, dtype, head):
    case = make_case(sequences=3, tokens=8, hidden=10, vocab=90, dtype=dtype, bias=True, train=train, scale=0.7, head=head).to(
        DEVICE
    )
    limits = {**LIMITS, torch.float64: (0, 1e-11)}
    for budget in (LARGE, TINY):
        with ll.settings(memory_budget=budget):
            plan = check_loss(name, case, train, limits[dtype][1])
        assert plan.options.slopes_later
        assert budget == LARGE or len(plan.steps) > 1 or (name == "gspo" and plan.schedule == "recompute")


@pytest.mark.parametrize(
    ("train", "dtype", "peaked"),
    [
        ("h", torch.float32, 8.0),
        ("w", torch.float16, 0.0),
        ("hwb", torch.float32, -10.0),
        ("hwb", torch.float16, 8.0),
        ("hwb", torch.float16, -10.0),
    ],
    ids=str,
)
def test_gradients_by_the_kernel_with_the_labels_in_the_tile(train, dtype, peaked, by_the_kernel, monkeypatch):
    if dtype == torch.float16:  # GEMMs take it, as a GPU's
        replace_in_backend(monkeypatch, "gemm_dtype", lambda dtype, device: dtype)
    case = make_case(
        sequences=2, tokens=10, hidden=10, vocab=90, dtype=dtype, bias=True, train=train, scale=0.7, peaked=peaked
    ).to(DEVICE)
    check_loss("ppo", case, train, 3 * LIMITS[dtype][1])
    assert sum(by_the_kernel) == int((case.labels >= 0).sum())


def test_rows_that_all_but_rule_out_their_label(by_the_kernel):
    case = make_case(sequences=2, tokens=20, hidden=24, vocab=200, scale=0.3, masked=0.0)
    with torch.no_grad():
        for i, rival in enumerate((1, 100, 199)):
            case.hidden[0, 3 + i] += 60 * case.weight[rival] / case.weight[rival].square().sum()
    case = case.to(DEVICE)
    check_loss("ppo", case, "hw", LIMITS[torch.float32][1])
    assert by_the_kernel


# Filtered gradients


def test_the_largest_mixed_entry_is_never_below_any():
    """And no larger than need be: an entry of that size can be in the block."""
    g = torch.Generator().manual_seed(0)
    largest = torch.cat((torch.rand(40, generator=g), 30 * torch.rand(40, generator=g), torch.tensor([0.0, 1 / math.e, 1.0])))
    mix = torch.randn(2, len(largest), generator=g)
    bound = tile_gradients.largest_mixed(largest[:, None].to(DEVICE), mix.to(DEVICE))[:, 0].cpu().double()
    e = torch.linspace(0, 1, 4001, dtype=torch.float64) * largest[:, None].double()
    constant, linear = mix.double()[:, :, None]
    sizes = e * constant.abs() + (torch.xlogy(e, e)).abs() * linear.abs()
    entries = (e * constant + linear * torch.xlogy(e, e)).abs()
    assert (entries.amax(1) <= bound * (1 + 1e-6) + 1e-30).all()
    assert (bound <= 2 * sizes.amax(1) + 1e-30).all()


@pytest.mark.parametrize(("of_logps", "of_entropy"), [(0.0, 1.0), (1.0, -0.3)])
def test_a_tile_keeps_all_that_reaches_the_filter(of_logps, of_entropy, by_the_kernel, monkeypatch):
    """Its bound is of the blocks' largest exponentials: it may keep more, and never less."""
    seen: list[Tensor] = []
    replace_in_backend(monkeypatch, "count_blocks", lambda active: seen.append(active != 0))
    case = filter_case(masked=0.0)
    n = case.labels.numel()
    model = Filtered(case, lambda logps, entropies: (of_logps * logps + of_entropy * entropies).mean())
    x, w, b, labels = case.hidden.detach()[0], case.weight.detach(), case.bias.detach(), case.labels[0]
    c, of = (torch.full((n,), value / n, device=DEVICE) for value in (of_logps, of_entropy))
    largest = model.blocks(model.without_labels().abs()).amax(dim=(1, 3))
    shares = []
    for grad_filter in (1e-38, model.threshold(), 4 * model.threshold(), 16 * model.threshold()):
        options = CoreOptions(frozenset({"entropy"}), grad_filter=grad_filter, slopes_later=True)
        tile = torch.full((n, len(w)), torch.nan, dtype=tile_dtype(x.dtype, DEVICE), device=DEVICE)
        stats = triton_backend.score(x, w, b, labels, HeadSpec(), options, tile=tile)
        dhidden = torch.full(x.shape, torch.nan, device=DEVICE)
        dhead = HeadGradient(w, b, need_weight=True, need_bias=True, accumulate=True)
        given = x, w, labels, tile, stats, c, HeadSpec(), options
        triton_backend.tile_gradients(*given, dhidden=dhidden, head_gradient=dhead, entropy_coefficients=of)
        active = seen.pop()
        shares.append(active.double().mean().item())
        assert (active | ((largest < grad_filter * (1 + 1e-5)) & ~model.holds_label)).all()
        for mine, true in zip((dhidden, dhead.weight), model.sums(active), strict=True):
            assert relative_error(mine, true) <= LIMITS[torch.float32][1]
        assert relative_error(dhead.bias, model.gradient.sum(dim=0)) <= LIMITS[torch.float32][1]  # nothing left out
    assert shares[0] == 1 > shares[-1]
    assert by_the_kernel == [n] * 4


def test_a_filter_that_leaves_out_nothing_changes_little():
    case = filter_case()
    given = {"advantages": torch.ones(1, device=DEVICE)}
    found = []
    for grad_filter in (0.0, 1e-38):
        with ll.settings(grad_filter=grad_filter):
            out = LOSSES["ppo"](case.hidden, case.weight, case.labels, case.bias, **given)
            found.append(gradients(out.loss, case))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) <= 1e-6
