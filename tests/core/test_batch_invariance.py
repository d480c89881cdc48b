"""The same bits of a hidden state give the same bits of its log-probability, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll
from logitless.kernels.backends.interface import Call
from logitless.kernels.backends.registry import get_backend, rank_backends
from logitless.kernels.backends.torch import blockwise
from logitless.kernels.backends.torch.passes import Logits
from logitless.kernels.core.blocking import ROW_MULTIPLE, block_shape, core_options
from logitless.kernels.core.stats import OUTPUTS

EVERY_BACKEND = True

HIDDEN, VOCAB, MOST = 96, 9001, 700
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BATCHES = [*range(1, 20), 31, 33, 64, 100, 255, 257, 511, 513, 700]


def problem(dtype: torch.dtype, tokens: int = MOST, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    w = (torch.randn(vocab, HIDDEN, generator=g) * 0.3).to(dtype)
    return x, w, torch.randint(vocab, (tokens,), generator=g)


def assert_same(got: ll.TokenStats, expected: ll.TokenStats, rows) -> None:
    for name in OUTPUTS:
        assert torch.equal(getattr(got, name), getattr(expected, name)[rows]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_part_of_a_batch_has_the_bits_of_the_whole(dtype):
    """Alone, in micro-batches of many sizes and at many places, permuted, and packed with positions that are not scored."""
    x, w, y = problem(dtype)
    head = ll.HeadSpec(softcap=20.0)
    whole = ll.linear_logps(x, w, y, head=head, outputs=OUTPUTS)
    g = torch.Generator().manual_seed(1)
    for size in BATCHES:
        for start in {0, (MOST - size) // 2, MOST - size}:
            rows = slice(start, start + size)
            assert_same(ll.linear_logps(x[rows], w, y[rows], head=head, outputs=OUTPUTS), whole, rows)
    order = torch.randperm(MOST, generator=g)
    assert_same(ll.linear_logps(x[order], w, y[order], head=head, outputs=OUTPUTS), whole, order)
    scored = torch.rand(MOST, generator=g) < 0.4
    some = ll.linear_logps(x, w, y.masked_fill(~scored, -100), head=head, outputs=OUTPUTS)
    assert_same(ll.TokenStats(*(v[scored] for v in some)), whole, scored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4096_tokens(dtype):
    x, w, y = problem(dtype, tokens=4096, vocab=1009)
    whole = ll.linear_logps(x, w, y).logps
    for rows in (slice(0, 1), slice(4095, 4096), slice(17, 2000), slice(1000, 1003), slice(5, 4090)):
        assert torch.equal(ll.linear_logps(x[rows], w, y[rows]).logps, whole[rows])


@pytest.mark.parametrize("train", ["hw", "h", "w"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_give_the_bits_of_the_op_in_every_schedule(dtype, train):
    """One tile, several tiles, a recomputed group, a frozen head: the number of tokens of a tile changes nothing."""
    x, w, y = problem(dtype, tokens=4 * 37, vocab=1009)
    expected = ll.linear_logps(x, w, y).logps
    x, w = x.requires_grad_("h" in train), w.requires_grad_("w" in train)
    loss = ll.FusedLinearPPOLoss()
    for budget in (512 << 20, 80 << 20):
        with ll.settings(memory_budget=budget):
            out = loss(x.view(4, 37, -1), w, y.view(4, 37), advantages=torch.ones(4, 37))
        assert torch.equal(out.logps.flatten(), expected)
    for rows in (slice(0, 37), slice(37, 74)):
        out = loss(x[None, rows], w, y[None, rows], advantages=torch.ones(1, 37))
        assert torch.equal(out.logps.flatten(), expected[rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_true_does_not_depend_on_the_budget_either(dtype):
    x, w, y = problem(dtype, tokens=100)
    expected = ll.linear_logps(x, w, y).logps
    with ll.settings(batch_invariant=True):
        for budget in (1000, 1 << 20, 20 << 20, 1 << 30):
            for rows in (slice(0, 100), slice(13, 14), slice(20, 57)):
                with ll.settings(memory_budget=budget):
                    assert torch.equal(ll.linear_logps(x[rows], w, y[rows]).logps, expected[rows])


def test_it_can_be_switched_off_and_bad_values_are_errors():
    x, w, y = problem(torch.float32, tokens=33)
    with ll.settings(batch_invariant=False) as current:
        assert current.batch_invariant is False
        with ll.settings(memory_budget=1 << 20) as inner:
            assert inner.batch_invariant is False
        off = ll.linear_logps(x, w, y).logps
    assert ((off - ll.linear_logps(x, w, y).logps).abs() < 1e-4).all()
    for value in (1, "yes"):
        with (
            pytest.raises(TypeError, match=r"^batch_invariant must be True, False or None, got"),
            ll.settings(batch_invariant=value),
        ):
            pass


@pytest.mark.parametrize("budget", [1000, 1 << 20, 64 << 20, 1 << 30])
def test_block_shapes_do_not_depend_on_the_number_of_tokens(budget):
    for invariant in (None, True):
        options = core_options(budget, frozenset(), "auto", 4, torch.device("cpu"), batch_invariant=invariant)
        assert options.batch_invariant
        shapes = {block_shape(n, VOCAB, 8, options.workspace, options.batch_invariant) for n in (0, 1, 7, 256, 4096)}
        ((rows, width),) = shapes
        assert rows % ROW_MULTIPLE == 0 and 1 <= width <= VOCAB
    forced = [core_options(b, frozenset(), "auto", 4, torch.device("cpu"), batch_invariant=True) for b in (budget, 1 << 30)]
    assert forced[0] == forced[1]


def test_the_choice_among_gpu_backends_does_not_depend_on_the_number_of_tokens():
    """Predictions for a GPU that need not be here; without the setting, few tokens get another backend than many."""
    call = Call(
        torch.device("cuda"), torch.bfloat16, torch.bfloat16, 1, 4096, 151936, architecture="sm_90", batch_invariant=True
    )
    calls = [
        replace(call, num_tokens=n, work=work, tiles=tiles, accumulate=tiles > 1, workspace=workspace)
        for n in (1, 33, 1024, 4096, 100_000)
        for work in ("forward", "tile", "frozen", "recompute")
        for tiles, workspace in ((1, 32 << 20), (4, 128 << 20))
    ]
    names = {tuple(backend.name for backend, _ in rank_backends([c], "auto")) for c in calls}
    assert len(names) == 1
    assert {rank_backends([replace(c, batch_invariant=False)], "auto")[0][1] for c in calls}  # predictions differ, all are made


def test_gemms_of_cublas_have_one_number_of_rows():
    """Fake tensors stand for those of a GPU: a block has as many rows as every GEMM, and fewer tokens are padded to it."""
    options = core_options(64 << 20, frozenset(), "auto", 4, torch.device("cuda"), batch_invariant=True)
    with FakeTensorMode():
        w = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda")
        sizes = (1, 7, 513, 4096, 100_000)
        shapes = {blockwise._partition(w.new_empty(n, HIDDEN), w, options) for n in sizes}
    ((rows, _, multiple),) = shapes
    assert rows == multiple

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.name():
                seen.add(len(args[0]))
            return func(*args, **(kwargs or {}))

    seen: set[int] = set()
    x, w, _ = problem(torch.float32, 64)
    with Rows():
        for n in (1, 7, 63, 64):
            Logits(x[:n], w, None, "auto", 64).block(0, 100, torch.empty(n, 100))
    assert seen == {64}


def test_triton_launches_do_not_depend_on_the_number_of_tokens():
    pytest.importorskip("triton")
    from logitless.kernels.backends.triton.tuning import configs
    from logitless.kernels.backends.triton.tuning.lookup import config_of

    assert get_backend("triton").score is not None
    for device in ("cpu", "meta"):
        for dtype in (torch.bfloat16, torch.float32):
            for head in (ll.HeadSpec(), ll.HeadSpec(softcap=30.0)):
                options = core_options(1 << 20, frozenset(), "auto", 4, torch.device(device), batch_invariant=True)
                found = {
                    config_of(torch.empty(n, 64, dtype=dtype, device=device), VOCAB, head, options)
                    for n in (1, 64, 65, 4096, 10**6)
                }
                assert len(found) == 1
    several = configs.table()["sm_90"]["16"]
    assert len({configs.pick(several, n) for n in (1, 4096)}) == 2  # which is what the setting is for
