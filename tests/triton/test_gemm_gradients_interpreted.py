"""The GEMM kernels of gradients against float64: recomputed blocks, and filtered products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from logitless.kernels.core.stats import CoreOptions

from .conftest import DEVICE, moved

pytest.importorskip("triton")
from logitless.kernels.backends.triton.gemm.filtered import filtered_mm
from logitless.kernels.backends.triton.gemm.launch import recompute_block

from .test_gemm_interpreted import CONFIG, HEADS, PLAIN, quick, score, some_rows

#: NumPy's, in the interpreter.
pytestmark = [
    pytest.mark.blas,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex:RuntimeWarning"),
]


@quick
@given(
    n=st.integers(1, 70),
    vocab=st.integers(1, 200),
    mixed=st.booleans(),
    at_label=st.booleans(),
    head=st.sampled_from(HEADS),
    threshold=st.sampled_from([0.0, 1e-3, 0.05, 1e9]),
    seed=st.integers(0, 5),
)
@example(n=1, vocab=1, mixed=True, at_label=True, head=PLAIN, threshold=0.05, seed=0)
@example(n=64, vocab=128, mixed=False, at_label=False, head=PLAIN, threshold=0.05, seed=0)
def test_gradient_blocks_and_which_of_them_count(n, vocab, mixed, at_label, head, threshold, seed):
    rows = some_rows(n, vocab=vocab, seed=seed)
    g = torch.Generator().manual_seed(seed)
    found = score(rows, head)
    k = found["k"]
    mix, entry, scale = (moved(torch.randn(shape, generator=g)) for shape in ((2, n), (n,), (n,)))
    scale = scale * (-found["log_denom"]).exp()
    z = head.apply(rows.raw())
    raw = rows.raw().requires_grad_()
    (slope,) = torch.autograd.grad(head.apply(raw).sum(), raw)
    distance = z - k.double()[:, None]
    expected = distance.exp() * slope / head.slope
    if mixed:
        expected = expected * (mix[0, :, None] + mix[1, :, None] * distance)
    expected[torch.arange(n), rows.labels] = entry.double() if at_label else 0
    gradient = torch.full((n, vocab), torch.nan, device=DEVICE)
    active = recompute_block(
        *rows, k, mix if mixed else None, entry if at_label else None, scale, gradient, head,
        CoreOptions(grad_filter=threshold), CONFIG, first=0,
    )  # fmt: skip
    tolerance = 1e-4 * (distance.exp() * (1 + mix.abs().sum(dim=0)[:, None] * (1 + distance.abs())) + expected.abs())
    assert ((gradient.double() - expected).abs() <= tolerance).all()
    if threshold == 0:
        assert active is None
        return
    size = (expected * scale.double()[:, None]).abs()
    for one in (0.999, 1.001):  # an entry at the threshold may go either way
        wanted = block_any(size >= threshold * one, rows.labels)
        assert ((active != 0) | ~wanted).all() if one > 1 else (wanted | (active == 0)).all()


def block_any(mask: Tensor, labels: Tensor) -> Tensor:
    """(n_blocks, v_blocks): blocks of CONFIG in which something of the mask or a label is."""
    mask = mask.clone()
    mask[torch.arange(len(labels)), labels] = True
    n, v = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -v % CONFIG.BLOCK_V, 0, -n % CONFIG.BLOCK_N))
    return padded.unflatten(1, (-1, CONFIG.BLOCK_V)).any(2).unflatten(0, (-1, CONFIG.BLOCK_N)).any(1)


@quick
@given(
    n=st.integers(1, 100),
    width=st.integers(1, 200),
    hidden=st.integers(1, 150),
    transposed=st.booleans(),
    accumulate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 5),
)
def test_filtered_products_read_nothing_that_is_left_out(n, width, hidden, transposed, accumulate, dtype, share, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, width, generator=g), torch.randn(n if transposed else width, hidden, generator=g)
    active = torch.rand(-(-n // CONFIG.BLOCK_N), -(-width // CONFIG.BLOCK_V), generator=g) < share
    kept = active.repeat_interleave(CONFIG.BLOCK_N, 0).repeat_interleave(CONFIG.BLOCK_V, 1)[:n, :width]
    a, b = a.to(dtype).masked_fill(~kept, torch.nan), b.to(dtype)
    a_exact = a.double().nan_to_num(nan=0.0)
    start = torch.randn(width if transposed else n, hidden, generator=g)
    expected = (a_exact.t() if transposed else a_exact) @ b.double() + (start.double() if accumulate else 0)
    out = moved(start.clone() if accumulate else torch.full_like(start, torch.nan))
    filtered_mm(moved(a), moved(b), out, moved(active.to(torch.int8)), CONFIG, transposed=transposed, accumulate=accumulate)
    assert (out.cpu().double() - expected).abs().max() <= 1e-5 * (1 + max(n, width)) ** 0.5
    if share == 0:
        assert torch.equal(out.cpu(), start if accumulate else torch.zeros_like(start))


def test_filtered_products_of_other_strides_and_types():
    """A tile's columns, hidden states' rows, and a gradient in the weight's own dtype."""
    g = torch.Generator().manual_seed(0)
    whole, b = torch.randn(50, 300, generator=g).half(), torch.randn(50, 40, generator=g).half()
    a, active = whole[:, 64:194], torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.int8)
    kept = active.bool().repeat_interleave(32, 0).repeat_interleave(64, 1)[:50, :130]
    out = torch.zeros(200, 80, dtype=torch.float16)
    to = moved(out)[30:160, 20:60]
    filtered_mm(moved(a), moved(b), to, moved(active), CONFIG, transposed=True, accumulate=False)
    expected = (a.double() * kept).t() @ b.double()
    assert ((to.cpu().double() - expected).abs() <= 2**-10 * expected.abs() + 1e-4).all()
