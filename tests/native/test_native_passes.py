"""The blockwise algorithm with compiled passes, which the ``cuda`` backend is and the ``cpu`` backend falls back to."""

from __future__ import annotations

import pytest
import torch

import logitless as ll
from logitless.kernels.backends.native import cpu as cpu_backend
from logitless.kernels.backends.native.passes import NATIVE_PASSES
from logitless.kernels.backends.torch import blockwise as torch_backend
from logitless.kernels.backends.torch.passes import TORCH_PASSES
from logitless.kernels.core.dtypes import accumulate_dtype, tile_dtype
from logitless.kernels.core.stats import OPTIONAL_OUTPUTS, CoreOptions
from logitless.kernels.operators import loading
from logitless.kernels.tile.head_gradient import HeadGradient

from ..core import test_linear_logps as promises
from ..helpers import gradients, make_case, relative_error

pytestmark = pytest.mark.skipif(bool(loading.why_no_cpu_extension()), reason="; ".join(loading.why_no_cpu_extension()))

HEADS = [ll.HeadSpec(), ll.HeadSpec(1.2, 8.0, 0.6)]
#: How far two ways to add and round the same numbers may be apart: logps, and gradients.
LIMITS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-5, 2**-7),
    torch.float16: (2e-5, 2**-9),
}
WIDTH = 64


@pytest.fixture
def narrow_blocks(monkeypatch):
    promises.shrink_blocks(monkeypatch, WIDTH)


@pytest.fixture
def no_small_gemm(monkeypatch):
    """A CPU on which oneDNN has no bfloat16 GEMM with a float32 result."""
    monkeypatch.setattr(cpu_backend, "has_bf16_gemm", lambda: False)
    with ll.settings(backend="cpu"):
        yield


def rows_that_raise_late(dtype: torch.dtype):
    """x (N, H), weight (V, H), bias, labels; three rows all but rule their label out, by rivals in three different blocks."""
    n, vocab, hidden = 9, 5 * WIDTH + 7, 24
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(n, hidden, generator=g), torch.randn(vocab, hidden, generator=g) * 0.3
    labels = torch.randint(WIDTH, (n,), generator=g)
    for row, rival in zip((1, 4, 8), (10, 2 * WIDTH + 5, vocab - 1), strict=True):
        x[row] += 45 * w[rival] / w[rival].square().sum()
    return x.to(dtype), w.to(dtype), torch.randn(vocab, generator=g).to(dtype), labels


def all_gradients(given, head, passes):
    """Statistics, and the gradients from a kept tile, from the frozen head's pass, and from recomputed logits."""
    x, w, bias, labels = given
    acc, options = accumulate_dtype(x.dtype), CoreOptions(frozenset(OPTIONAL_OUTPUTS), "float32")
    c = torch.linspace(-1, 1, len(x), dtype=acc)
    tile = torch.full((len(x), len(w)), torch.nan, dtype=tile_dtype(x.dtype, x.device))
    stats = torch_backend.score(x, w, bias, labels, head, options, tile=tile, passes=passes)
    unit = torch_backend.score(x, w, bias, labels, head, options, unit_dhidden=True, passes=passes).unit_dhidden
    found = [unit]
    for kept in (True, False):
        dhidden = torch.empty(x.shape, dtype=acc)
        dhead = HeadGradient(w, bias, need_weight=True, need_bias=True, accumulate=True)
        if kept:
            torch_backend.tile_gradients(x, w, labels, tile, stats, c, head, options, dhidden=dhidden, head_gradient=dhead)
        else:
            entropy = torch.full_like(c, 0.3)
            torch_backend.recompute_gradients(
                x, w, bias, labels, stats, c, entropy, head, options, dhidden=dhidden, head_gradient=dhead, passes=passes
            )
        found += [dhidden, dhead.weight, dhead.bias]
    return stats, found


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap"])
def test_compiled_passes_agree_with_torch_operators(dtype, head, narrow_blocks):
    given, (limit, gradient_limit) = rows_that_raise_late(dtype), LIMITS[dtype]
    ours, found = all_gradients(given, head, NATIVE_PASSES)
    theirs, expected = all_gradients(given, head, TORCH_PASSES)
    if head.softcap is None:
        assert (ours.target_offset < -30).nonzero()[:, 0].tolist() == [1, 4, 8]
    for name in ("logps", "k", "sum_others", "log_denom", "entropy", "mean_logits", "log_sum_sq_probs"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        assert ((mine - its).abs() / (1 + its.abs())).max() <= limit, name
    assert torch.equal(ours.is_top1, theirs.is_top1)
    for mine, its in zip(found, expected, strict=True):
        assert relative_error(mine, its) <= gradient_limit


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_finished_tile_is_relative_to_the_last_offset_of_its_rows(dtype, narrow_blocks):
    x, w, bias, labels = rows_that_raise_late(dtype)
    tile = torch.full((len(x), len(w)), torch.nan, dtype=tile_dtype(dtype, x.device))
    options = CoreOptions(precision="float32")
    stats = torch_backend.score(x, w, bias, labels, HEADS[0], options, tile=tile, passes=NATIVE_PASSES)
    z = x.double() @ w.double().t() + bias.double()
    wanted = (z - stats.k.double()[:, None]).exp()
    wanted[torch.arange(len(x)), labels] = 0  # a CPU adds the label's share beside the GEMMs
    error = (tile.double() - wanted).abs() / (wanted + 1e-30)
    assert error[wanted > 1e-30].max() <= 2.5 * torch.finfo(tile.dtype).eps + (1e-12 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("peaked", [0.0, -60.0])
@pytest.mark.parametrize("train", ["h", "hw"])
def test_losses_of_bfloat16_inputs_without_the_small_gemm(no_small_gemm, train, peaked):
    case = make_case(dtype=torch.bfloat16, train=train, vocab=900, hidden=32, tokens=9, scale=0.3, peaked=peaked)
    for budget in (1 << 30, 100_000):
        with ll.settings(memory_budget=budget):
            out = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels)
            with ll.settings(backend="torch"):
                expected = ll.FusedLinearSimPOLoss()(case.hidden, case.weight, case.labels)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
        for ours, theirs in zip(gradients(out.loss, case), gradients(expected.loss, case), strict=True):
            assert relative_error(ours, theirs) <= 2**-7


def test_bfloat16_without_the_small_gemm_is_no_worse_than_plain_pytorch(no_small_gemm):
    for scale, peaked, gain in ((0.05, 0.0, 10.0), (0.05, 12.0, 10.0), (1.0, 8.0, 1.0)):
        promises.test_bfloat16_is_no_worse_than_plain_pytorch(scale, peaked, gain)


def test_promises_that_bfloat16_keeps_without_the_small_gemm(no_small_gemm, monkeypatch):
    promises.test_match_precision_rounds_the_logits_as_the_model_does()
    promises.test_float32_precision_never_rounds_the_logits()
    promises.test_bitwise_repeatable()
    promises.test_a_token_does_not_depend_on_its_neighbours_or_padding()
    promises.test_top1_ties_of_equal_rows_go_to_the_first_in_any_block(torch.bfloat16, monkeypatch)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_bias_of_any_stride(dtype):
    case = make_case(dtype=dtype, train="h")
    strided = torch.randn(101, 3, generator=torch.Generator().manual_seed(0)).to(accumulate_dtype(dtype))[:, 1]
    stats = [scored_logps(case, bias) for bias in (strided, strided.contiguous())]
    assert torch.equal(*stats)


def scored_logps(case, bias):
    scored = case.labels >= 0
    given = case.hidden.detach()[scored], case.weight.detach(), bias, case.labels[scored]
    return cpu_backend.score(*given, HEADS[0], CoreOptions()).logps


def test_a_loader_says_why_there_are_no_cuda_operators(monkeypatch, tmp_path):
    def reasons(path, **changes) -> list[str]:
        loading._why_no_cuda.cache_clear()
        loading._cuda.cache_clear()
        with monkeypatch.context() as m:
            m.setattr(loading, "_path", lambda stem: path)
            m.setattr(torch.version, "cuda", changes.get("cuda", "13.0"))
            m.setattr(torch.cuda, "is_available", lambda: changes.get("device", True))
            found = loading.why_no_cuda_extension()
        loading._why_no_cuda.cache_clear()
        loading._cuda.cache_clear()
        return found

    missing, broken = tmp_path / "_cuda.so", tmp_path / "broken.so"
    broken.write_text("not a library")
    (built,) = reasons(missing)
    assert "is not built" in built and "LOGITLESS_EXT=cpu,cuda" in built
    assert reasons(missing, device=False) == ["there is no CUDA device", built]
    assert reasons(broken, cuda=None) == [f"torch {torch.__version__} is built without CUDA"]
    (loads,) = reasons(broken)
    assert loads.startswith("broken.so does not load: ")
