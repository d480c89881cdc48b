"""Packing: sequences end to end, with shifted labels, and back."""

from __future__ import annotations

import pytest
import torch

from logitless.fused.models.packing import PackedSequences, pack, unpack

LENGTHS = [
    pytest.param([4, 2, 5], id="uneven"),
    pytest.param([0, 3, 1, 0, 2, 1], id="with-none-and-one"),
    pytest.param([3], id="single"),
    pytest.param([0, 0], id="only-empty"),
    pytest.param([], id="no-sequence"),
]


def ids_of(lengths: list[int]) -> list[list[int]]:
    """Different tokens, so that none can be taken for another."""
    end, out = 10, []
    for n in lengths:
        out.append(list(range(end, end + n)))
        end += n
    return out


def labels_by_hand(ids: list[list[int]], prompts: list[int]) -> list[int]:
    out = []
    for sequence, prompt in zip(ids, prompts, strict=True):
        for t in range(len(sequence)):
            following = t + 1
            out.append(sequence[following] if following < len(sequence) and following >= prompt else -100)
    return out


def padded(ids: list[list[int]], side: str, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (S, T) with 999 at padding, and the mask."""
    width = max(map(len, ids), default=0) + extra
    out, mask = torch.full((len(ids), width), 999), torch.zeros(len(ids), width, dtype=torch.long)
    for row, sequence in enumerate(ids):
        start = 0 if side == "right" else width - len(sequence)
        out[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start : start + len(sequence)] = 1
    return out, mask


def same(a: PackedSequences, b: PackedSequences) -> bool:
    assert a.labels is not None and b.labels is not None
    pairs = ((a.input_ids, b.input_ids), (a.position_ids, b.position_ids), (a.cu_seqlens, b.cu_seqlens), (a.labels, b.labels))
    return a.max_seqlen == b.max_seqlen and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_list_is_laid_end_to_end_with_shifted_labels(lengths):
    ids = ids_of(lengths)
    packed = pack(ids)
    assert packed.input_ids.tolist() == [t for i in ids for t in i]
    assert packed.position_ids.tolist() == [t for n in lengths for t in range(n)]
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.lengths.tolist() == lengths
    assert packed.num_sequences == len(lengths) and packed.max_seqlen == max(lengths, default=0)
    assert packed.labels.tolist() == labels_by_hand(ids, [0] * len(lengths))
    assert (packed.input_ids.dtype, packed.position_ids.dtype) == (torch.int64, torch.int64)
    assert (packed.labels.dtype, packed.cu_seqlens.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_form_of_the_same_sequences_packs_alike(lengths, side):
    ids = ids_of(lengths)
    expected = pack(ids)
    values, mask = padded(ids, side)
    assert same(pack(values, attention_mask=mask), expected)
    assert same(pack(values.int(), attention_mask=mask.bool()), expected)
    assert same(pack([torch.tensor(i, dtype=torch.int32) for i in ids]), expected)
    assert same(pack(expected.input_ids, cu_seqlens=expected.cu_seqlens), expected)


def test_a_padded_tensor_without_a_mask_has_no_padding():
    values = torch.arange(6).view(2, 3)
    assert same(pack(values), pack(values.tolist()))


@pytest.mark.parametrize("prompts", [[0, 0, 0], [2, 1, 3], [4, 2, 5], [3, 0, 5]])
def test_prompt_lengths_and_labels_say_the_same(prompts):
    ids = ids_of([4, 2, 5])
    labels = [[-100] * p + i[p:] for i, p in zip(ids, prompts, strict=True)]
    expected = labels_by_hand(ids, prompts)
    assert pack(ids, prompt_lengths=prompts).labels.tolist() == expected
    assert pack(ids, prompt_lengths=torch.tensor(prompts, dtype=torch.int32)).labels.tolist() == expected
    assert pack(ids, labels=labels).labels.tolist() == expected
    values, mask = padded(ids, "left")
    padded_labels, _ = padded(labels, "left")  # whatever stands at padding is not read
    assert pack(values, attention_mask=mask, labels=padded_labels).labels.tolist() == expected
    flat = pack(ids)
    cu = flat.cu_seqlens
    assert pack(flat.input_ids, cu_seqlens=cu, labels=torch.tensor([t for i in labels for t in i])).labels.tolist() == expected


def test_labels_may_differ_from_the_ids_and_ignore_index_is_the_callers():
    packed = pack([[1, 2, 3], [4, 5]], labels=[[7, 8, -1], [9, 6]], ignore_index=-1)
    assert packed.labels.tolist() == [8, -1, -1, 6, -1]
    assert packed.ignore_index == -1


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rest", [(), (3,), (2, 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_unpacking_gives_back_exactly_what_was_packed(lengths, rest, side):
    packed = pack(ids_of(lengths))
    values = torch.randn(sum(lengths), *rest)
    parts = unpack(values, packed.cu_seqlens)
    assert [len(p) for p in parts] == lengths
    assert torch.equal(torch.cat([values[:0], *parts]), values)
    batch = packed.unpack(values, padded=True, padding_value=-5, padding_side=side, max_seqlen=packed.max_seqlen + 2)
    assert batch.shape == (len(lengths), packed.max_seqlen + 2, *rest)
    for row, part in zip(batch, parts, strict=True):
        rest_of_row = len(row) - len(part)
        left, right = row.split([len(part), rest_of_row] if side == "right" else [rest_of_row, len(part)])
        kept, padding = (left, right) if side == "right" else (right, left)
        assert torch.equal(kept, part)
        assert (padding == -5).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_padded_batch_survives_the_round_trip(lengths, side):
    values, mask = padded(ids_of(lengths), side, extra=0)
    packed = pack(values, attention_mask=mask)
    assert torch.equal(packed.unpack(packed.input_ids, padded=True, padding_value=999, padding_side=side), values)


@pytest.mark.parametrize("side", ["right", "left"])
def test_unpacking_is_differentiable(side):
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 3, 3, 4, 6])
    assert torch.autograd.gradcheck(lambda v: unpack(v, cu, padded=True, padding_side=side, padding_value=7), values)
    assert torch.autograd.gradcheck(lambda v: tuple(unpack(v, cu)), values)


def test_model_inputs_are_one_row_and_flash_attention_gets_the_bounds_of_what_has_tokens():
    packed = pack(ids_of([0, 3, 0, 1]))
    plain = packed.model_inputs()
    assert plain.keys() == {"input_ids", "position_ids"}
    assert plain["input_ids"].tolist() == [packed.input_ids.tolist()]
    assert plain["position_ids"].tolist() == [[0, 1, 2, 0]]
    flash = packed.model_inputs(flash_attention=True)
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == [0, 3, 4]
    assert flash["cu_seq_lens_q"].dtype == torch.int32
    assert (flash["max_length_q"], flash["max_length_k"]) == (3, 3)


def test_a_pack_moves_to_a_device_whole():
    packed = pack([[1, 2, 3]], ignore_index=-1).to("meta")
    assert {t.device.type for t in (packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.labels)} == {"meta"}
    assert (packed.max_seqlen, packed.ignore_index) == (3, -1)


IDS, MASK = torch.arange(6).view(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
CU = torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack("text"), TypeError, "sequences must be a tensor, a list"),
        (lambda: pack([1, 2]), TypeError, r"sequences\[0\] must be a 1-D tensor or a list of ints, got int"),
        (lambda: pack([[1.0, 2.0]]), TypeError, "sequences must hold ints, got float"),
        (lambda: pack([[1, True]]), TypeError, "sequences must hold ints, got bool"),
        (lambda: pack([torch.ones(3)]), TypeError, r"sequences\[0\] must be int32 or int64, got torch.float32"),
        (lambda: pack([torch.ones(3, 1).long()]), ValueError, r"sequences\[0\] must be 1-D, got shape \(3, 1\)"),
        (lambda: pack([torch.ones(3).long(), [1]]), TypeError, r"sequences\[1\] must be a torch.Tensor, got list"),
        (lambda: pack(IDS.double()), TypeError, "sequences must be int32 or int64, got torch.float64"),
        (lambda: pack(IDS.view(-1)), ValueError, r"got a tensor of shape \(6,\) without cu_seqlens"),
        (lambda: pack(IDS[None]), ValueError, r"got a tensor of shape \(1, 2, 3\)"),
        (lambda: pack(IDS, attention_mask=MASK[:1]), ValueError, r"attention_mask must have shape \(2, 3\), got \(1, 3\)"),
        (lambda: pack(IDS, attention_mask=MASK.float()), TypeError, "attention_mask must be bool or integer"),
        (lambda: pack(IDS, attention_mask=MASK * 2), ValueError, "attention_mask must be 1 at tokens and 0 at padding"),
        (
            lambda: pack(IDS, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])),
            ValueError,
            "row 1 has padding between tokens",
        ),
        (lambda: pack([[1, 2]], attention_mask=MASK), ValueError, "attention_mask is for padded ids"),
        (lambda: pack([[1, 2]], cu_seqlens=CU), ValueError, "cu_seqlens is for packed ids"),
        (lambda: pack(IDS, cu_seqlens=CU), ValueError, "cu_seqlens is for packed ids"),
        (lambda: pack(IDS.view(-1), cu_seqlens=CU[:2]), ValueError, "cu_seqlens must start at 0, never fall, and end at"),
        (lambda: pack(IDS, labels=IDS[:, 1:]), ValueError, r"labels must have shape \(2, 3\) like the sequences"),
        (lambda: pack(IDS, labels=IDS.float()), TypeError, "labels must be int32 or int64"),
        (lambda: pack([[1, 2], [3]], labels=[[1], [2, 3]]), ValueError, r"lengths of the sequences, \[2, 1\], got \[1, 2\]"),
        (lambda: pack([[1, 2]], labels=[[1, 2]], prompt_lengths=[1]), ValueError, "labels and prompt_lengths both"),
        (
            lambda: pack([[1, 2]], prompt_lengths=[3]),
            ValueError,
            r"prompt_lengths\[0\] must be between 0 and .* got 3",
        ),
        (lambda: pack([[1], [2]], prompt_lengths=[0, -1]), ValueError, r"prompt_lengths\[1\] must be between 0 and"),
        (lambda: pack([[1, 2]], prompt_lengths=[1, 1]), ValueError, r"prompt_lengths must have one value per sequence"),
        (lambda: pack([[1, 2]], prompt_lengths=[0.5]), TypeError, "prompt_lengths must be int32 or int64"),
        (lambda: pack([[1, 2]], ignore_index=1.0), TypeError, "ignore_index must be an int"),
        (lambda: unpack([1, 2], CU), TypeError, "values must be a torch.Tensor, got list"),
        (lambda: unpack(torch.tensor(1), CU), ValueError, "values must have shape"),
        (lambda: unpack(torch.zeros(5), CU), ValueError, "cu_seqlens must start at 0, never fall, and end at"),
        (lambda: unpack(torch.zeros(6), torch.tensor([0, 4, 2, 6])), ValueError, "cu_seqlens must start at 0, never fall"),
        (lambda: unpack(torch.zeros(6), CU.float()), ValueError, "cu_seqlens must be int32 or int64"),
        (lambda: unpack(torch.zeros(6), CU, padded=True, padding_side="up"), ValueError, "padding_side must be"),
        (lambda: unpack(torch.zeros(6), CU, padded=True, max_seqlen=3), ValueError, "max_seqlen must be an int of at least"),
        (lambda: unpack(torch.zeros(6), CU, max_seqlen=8), ValueError, "pass padded=True"),
        (lambda: unpack(torch.zeros(6), CU, padding_value=1), ValueError, "pass padded=True"),
        (lambda: PackedSequences(IDS[0].int(), IDS[0], CU.int(), 3), TypeError, "input_ids must be int64"),
        (lambda: PackedSequences(IDS[0], IDS[0, :2], CU.int(), 3), ValueError, "position_ids must have shape"),
        (lambda: PackedSequences(IDS[0], IDS[0], CU, 3), ValueError, "cu_seqlens must be int32"),
    ],
)
def test_bad_input_is_an_error_that_names_the_argument_of_packing(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_mask_is_where_something_is_scored():
    packed = pack([[5, 6, 7], [8], [], [9, 10]], prompt_lengths=[2, 0, 0, 0])
    assert packed.mask.tolist() == [False, True, False, False, True, False]
    every = PackedSequences(packed.input_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen)
    assert every.mask.tolist() == [True, True, False, False, True, False]
    assert pack([[], []]).mask.tolist() == []
