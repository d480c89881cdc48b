"""The value loss against verl's formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitless.fused.rl.values import ValueLoss, value_loss

from .tokens import F32, F64, INF, NAN, ROUND, quick


def some_values(shape, dtype=F64, seed=0):
    """Values, returns and old values that clip some of them, and a mask."""
    g = torch.Generator().manual_seed(seed)
    values, returns, old = (torch.randn(shape, generator=g, dtype=F64).to(dtype) for _ in range(3))
    return values, returns, old, torch.rand(shape, generator=g) < 0.7


def verl_value_loss(values, returns, old, clip_range, mask, aggregation):
    """verl's compute_value_loss, padded; a sequence without tokens counts as 0."""
    losses = (values - returns) ** 2
    fraction = torch.zeros((), dtype=values.dtype)
    if clip_range is not None:
        clipped = (torch.max(torch.min(values, old + clip_range), old - clip_range) - returns) ** 2
        fraction = ((clipped > losses) * mask).sum() / mask.sum().double()
        losses = torch.max(losses, clipped)
    if aggregation == "token-mean":
        return 0.5 * (losses * mask).sum() / mask.sum().double(), fraction
    return 0.5 * ((losses * mask).sum(-1) / mask.sum(-1).double().clamp(min=1)).mean(), fraction


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("clip_range", [None, 0.2, 1.0])
def test_the_value_loss_is_that_of_verl(clip_range, aggregation):
    values, returns, old, mask = some_values((5, 9))
    mask[3] = False
    values.requires_grad_()
    clip = {} if clip_range is None else {"old_values": old, "clip_range": clip_range}
    wanted, fraction = verl_value_loss(values, returns, old, clip_range, mask, aggregation)
    got = value_loss(values, returns, mask=mask, aggregation=aggregation, **clip)
    assert isinstance(got, ValueLoss)
    torch.testing.assert_close(got.loss, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.clip_fraction, fraction, rtol=1e-14, atol=0)
    assert (clip_range is None) == (float(fraction) == 0)
    assert not got.clip_fraction.requires_grad
    (a,), (b,) = (torch.autograd.grad(loss, values) for loss in (got.loss, wanted))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@quick(25)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    aggregation=st.sampled_from(["token-mean", "sequence-mean"]),
    seed=st.integers(0, 9),
)
def test_packed_values_have_the_loss_of_padded_ones(lengths, aggregation, seed):
    n = sum(lengths)
    values, returns, old, mask = some_values((n,), seed=seed)
    bounds = [0, *itertools.accumulate(lengths)]
    rows = [torch.zeros(len(lengths), max(lengths), dtype=t.dtype) for t in (values, returns, old, mask)]
    for row, packed in zip(rows, (values, returns, old, mask), strict=True):
        for j, (a, b) in enumerate(itertools.pairwise(bounds)):
            row[j, : b - a] = packed[a:b]
    options = {"clip_range": 0.3, "aggregation": aggregation}
    got = value_loss(values, returns, old_values=old, mask=mask, cu_seqlens=torch.tensor(bounds), **options)
    wanted = value_loss(rows[0], rows[1], old_values=rows[2], mask=rows[3], **options)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_what_stands_at_masked_positions_reaches_neither_value_nor_gradient(aggregation, garbage):
    for dtype in (F32, F64):
        values, returns, old, mask = some_values((4, 7), dtype)
        mask[2] = False
        results = []
        for fill in (0.0, garbage):
            v = values.masked_fill(~mask, fill).requires_grad_()
            others = returns.masked_fill(~mask, fill), old.masked_fill(~mask, -fill)
            out = value_loss(v, others[0], old_values=others[1], clip_range=0.2, mask=mask, aggregation=aggregation)
            results.append((*out, torch.autograd.grad(out.loss, v)[0]))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert (results[1][2][~mask] == 0).all()


def test_the_value_loss_is_differentiable_in_the_values_alone():
    values, returns, old, mask = (t.requires_grad_() if t.is_floating_point() else t for t in some_values((3, 5)))
    for aggregation in ("token-mean", "sequence-mean"):

        def loss(v, aggregation=aggregation):
            return value_loss(v, returns, old_values=old, clip_range=0.4, mask=mask, aggregation=aggregation).loss

        assert torch.autograd.gradcheck(loss, values)
        assert torch.autograd.grad(loss(values), (returns, old), allow_unused=True) == (None, None)


def test_the_value_loss_of_no_tokens_is_0():
    values = torch.zeros(3, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.bool)
    for options in ({"mask": nothing}, {"mask": nothing, "cu_seqlens": torch.tensor([0, 3]), "aggregation": "sequence-mean"}):
        out = value_loss(values, torch.full((3,), NAN), **options)
        assert out.loss == 0 and torch.autograd.grad(out.loss, values)[0].tolist() == [0, 0, 0]
    empty = torch.zeros(0)
    assert value_loss(empty, empty).loss == 0
    assert value_loss(empty, empty, cu_seqlens=torch.tensor([0]), aggregation="sequence-mean").loss == 0


def test_the_value_loss_of_16_bits_is_computed_in_float32():
    values, returns, _, _ = some_values((64,), torch.bfloat16)
    got = value_loss(values, returns).loss
    assert got.dtype == F32
    wanted = 0.5 * (values.double() - returns.double()).square().mean()
    assert abs(float(got) / float(wanted) - 1) <= 8 * ROUND[F32]


BAD_VALUES = [
    ({"clip_range": 0.2}, ValueError, "clip_range is given without old_values"),
    ({"old_values": torch.zeros(4)}, ValueError, "old_values is given without clip_range"),
    ({"old_values": torch.zeros(4), "clip_range": 0}, ValueError, "clip_range must be a finite number"),
    ({"old_values": torch.zeros(3), "clip_range": 0.1}, ValueError, r"old_values must have shape \(4,\) like values"),
    ({"returns": torch.zeros(4, 1)}, ValueError, r"returns must have shape \(4,\) like values, got \(4, 1\)"),
    ({"returns": torch.zeros(4, dtype=torch.long)}, TypeError, "returns must be floating point"),
    ({"mask": torch.ones(4)}, TypeError, "mask must be bool"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask must have shape"),
    ({"aggregation": "mean"}, ValueError, r"aggregation must be one of \['sequence-mean', 'token-mean'\], got 'mean'"),
    ({"aggregation": "sequence-mean"}, ValueError, r"values must have shape \[S, T\], or \[N\] with cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "end at the token count 4"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_VALUES)
def test_bad_input_of_the_value_loss_is_an_error_that_names_it(changes, error, message):
    with pytest.raises(error, match=message):
        value_loss(**{"values": torch.zeros(4), "returns": torch.zeros(4), **changes})


def test_values_of_three_dimensions_are_an_error():
    with pytest.raises(ValueError, match=r"values must have shape \[N\] or \[S, T\], got \(2, 2, 2\)"):
        value_loss(torch.zeros(2, 2, 2), torch.zeros(2, 2, 2))
