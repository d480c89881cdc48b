"""Runs a model on packed sequences, as one padding-free row or as a right-padded batch, up to its head."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight

from .attention import (
    attention_of,
    max_row,
    takes_bounds,
    why_not_batch,
    why_not_causal,
    why_not_padding_free,
    why_not_right_padded,
)
from .causal_lm import (
    causal_lm,
    check_head_input,
    head_parameters,
    head_width,
    num_token_ids,
    run_model,
    takes_positions,
)
from .head_probe import model_head
from .layout import Layout, lay_out
from .model_kwargs import ModelKwargs, is_composite, media_token_ids, read_kwargs
from .offload import check_head_is_there, loaded_head
from .packing import PackedSequences, make_pack, unpack

log = logging.getLogger("logitless")


class HeadCall(NamedTuple):
    """The call of a model's head, for positions in the shape in which the model ran."""

    hidden: Tensor  # (..., H)
    weight: Weight  # (V, H)
    bias: Tensor | None  # (V,)
    head: HeadSpec
    labels: Tensor  # (...), shifted
    where: Tensor  # (N,) the flat position of each packed token


class Placed(NamedTuple):
    """Packed sequences, the layout they came in, and their positions."""

    packed: PackedSequences
    layout: Layout
    positions: Tensor | None  # (N,), None where every sequence starts at 0


@dataclass(frozen=True)
class RunOptions:
    """How to run a model; see :func:`logitless.model_logps`."""

    head: HeadSpec | None = None
    temperature: float | None = None
    padding_free: bool | None = None
    model_kwargs: Mapping[str, Any] | None = None


def place_packed(packed: PackedSequences, position_ids: Any = None) -> Placed:
    """Check packed sequences, and positions laid out like them (default: the pack's own)."""
    ids, layout = lay_out(packed.input_ids, None, packed.cu_seqlens, name="input_ids")
    checked = make_pack(ids, layout, ignore_index=packed.ignore_index)
    if (labels := packed.labels) is not None:
        last = torch.tensor([b - 1 for a, b in itertools.pairwise(layout.bounds) if b > a], dtype=torch.long)
        if bool((labels[last.to(labels.device)] != checked.ignore_index).any()):
            raise ValueError("input_ids.labels must be ignore_index at the last token of each sequence, which predicts none")
        checked = replace(checked, labels=labels)
    return place(checked, layout, packed.position_ids if position_ids is None else position_ids)


def place(packed: PackedSequences, layout: Layout, position_ids: Any) -> Placed:
    """Check positions, which are laid out as the caller's sequences were."""
    if position_ids is None:
        return Placed(packed, layout, None)
    positions = layout.flatten("position_ids", position_ids)
    inside = packed.position_ids[1:] > 0
    if bool((inside & (positions.diff() != 1)).any()):
        raise ValueError("position_ids must rise by 1 from token to token of a sequence")
    return Placed(packed, layout, positions if bool((positions != packed.position_ids).any()) else None)


def run_packed(model: nn.Module, sequences: Placed, score: Callable[[HeadCall], Any], options: RunOptions) -> tuple[Any, Any]:
    """Run the model on packed sequences with ``score`` in place of its head; returns the result of ``score`` and the output.

    The sequences run as one padding-free row or as a right-padded batch: the correct one that costs less. Arguments with one
    value per token are laid out as the tokens are.
    """
    packed, layout, positions = sequences
    if options.padding_free not in (True, False, None):
        raise TypeError(f"padding_free must be True, False or None, got {options.padding_free!r}")
    lm = causal_lm(model)
    check_head_is_there(lm)
    kwargs = read_kwargs(lm, options.model_kwargs or {}, layout)
    if not kwargs.of_rows:
        _refuse(why_not_causal(model, lm))
        # Probes of both layouts, whichever the data takes: ranks of a sharded model run the same number of forward passes.
        wrong = [] if options.padding_free else why_not_right_padded(model, lm)
        if options.padding_free is not False:
            why_not_padding_free(model)
    reasons = _why_not_one_row(model, lm, options.padding_free, sequences, kwargs)
    log.debug("packed sequences: %s", f"right-padded batch: {'; '.join(reasons)}" if reasons else "one padding-free row")

    per_token = kwargs.per_token
    if not len(packed.input_ids):
        # The model still runs, on one token that is not scored: ranks stay in step, and the result has a gradient of 0.
        where = packed.input_ids
        inputs: dict[str, Any] = {"input_ids": where.new_zeros(1, 1)}
        inputs |= {name: value.new_zeros(1, 1, *value.shape[1:]) for name, value in per_token.items()}
        targets = where.new_full((1, 1), packed.ignore_index)
    elif reasons:
        inputs, targets, where = _right_padded(lm, packed, positions, per_token)
    else:
        inputs = packed.model_inputs(flash_attention=takes_bounds(lm))
        inputs |= {name: value[None] for name, value in per_token.items()}
        assert packed.labels is not None
        targets, where = packed.labels[None], torch.arange(len(packed.input_ids), device=packed.input_ids.device)
    inputs |= kwargs.others

    if kwargs.of_rows:
        _refuse(why_not_batch(model, lm, inputs, per_token, targets != packed.ignore_index))
    elif reasons:
        _refuse(wrong)

    spec = model_head(model, lm, options.head, options.temperature, inputs)

    def call(hidden: Tensor) -> Any:
        check_head_input(lm, hidden, tuple(targets.shape))
        with loaded_head(lm):
            return score(HeadCall(hidden, *head_parameters(lm), spec, targets, where))

    return run_model(model, lm, inputs, call)


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"model cannot be used: {'; '.join(reasons)}")


def _why_not_one_row(model: nn.Module, lm: Any, padding_free: bool | None, sequences: Placed, kwargs: ModelKwargs) -> list[str]:
    """Why this call does not run as one row; empty when it does."""
    packed, bounds = sequences.packed, sequences.layout.bounds
    of_batch = [*kwargs.of_rows, *(kwargs.per_token if is_composite(lm) else ())]
    if of_batch and sequences.positions is not None and is_composite(lm):
        raise ValueError(
            f"position_ids cannot be given beside {', '.join(of_batch)}: {type(lm).__name__} derives the positions of images"
        )
    if padding_free is False:
        return ["padding_free=False"]
    if of_batch:
        reasons = [f"{', '.join(of_batch)}: for images and data of rows, the sequences must be rows of a batch"]
    elif sequences.positions is not None:  # transformers would take 5, 6, 7 | 8, 9 for one sequence
        reasons = ["position_ids do not start at 0 in each sequence, by which models tell them apart"]
    elif (longest := max_row(lm)) is not None and bounds[-1] > longest:
        reasons = [f"a row of {bounds[-1]} tokens is longer than the model's mask of {longest}"]
    else:
        reasons = why_not_padding_free(model)
    if reasons and padding_free:
        raise ValueError(f"padding_free=True cannot be had: {'; '.join(reasons)}. Pass None or False for a right-padded batch")
    if reasons or padding_free or attention_of(lm) not in ("eager", "sdpa"):
        return reasons
    sizes = [size for size in sequences.layout.sizes if size]
    width = head_width(lm)
    one, batch = _layer_cost(1, bounds[-1], width), _layer_cost(len(sizes), packed.max_seqlen, width)
    return [f"a row of {bounds[-1]} tokens costs {one / batch:.1f} times the padded batch"] if one > batch else []


def _layer_cost(rows: int, tokens: int, width: int) -> int:
    """FLOP of a decoder layer over ``rows`` of ``tokens`` with every entry of the attention computed, / (4 * width).

    24 * width ** 2 per token for projections and a 4 * width feed-forward, 4 * width per entry of the attention.
    """
    return rows * tokens * (6 * width + tokens)


def _right_padded(
    lm: Any,
    packed: PackedSequences,
    positions: Tensor | None,  # (N,), where sequences do not start at 0
    per_token: Mapping[str, Tensor],  # (N, ...) each
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The model's inputs, shifted labels of their shape, and the place of each token in it, (N,). Empty rows are left out."""
    if positions is not None and not takes_positions(lm):
        raise ValueError(f"position_ids: {type(lm).__name__}.forward takes none")
    compact = packed.cu_seqlens.unique_consecutive()
    # RoBERTa-like models derive positions from the pad token; a config may name one that the embedding does not have
    pad, media = getattr(lm.config.get_text_config(), "pad_token_id", None), media_token_ids(lm)
    if not isinstance(pad, int) or not 0 <= pad < num_token_ids(lm) or pad in media:
        pad = next(i for i in range(num_token_ids(lm)) if i not in media)

    def padded(values: Tensor, value: int) -> Tensor:
        result = unpack(values, compact, padded=True, padding_value=value)
        assert isinstance(result, Tensor)
        return result

    assert packed.labels is not None
    mask = padded(torch.ones_like(packed.input_ids), 0)
    inputs: dict[str, Any] = {
        "input_ids": padded(packed.input_ids, pad),
        "attention_mask": mask,
        **{name: padded(value, 0) for name, value in per_token.items()},
    }
    if positions is not None:
        inputs["position_ids"] = padded(positions, 0)
    return inputs, padded(packed.labels, packed.ignore_index), mask.reshape(-1).nonzero()[:, 0]
