"""Runs a model on packed sequences, as one padding-free row or as a right-padded batch, up to its head."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import check_spec
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight

from .attention import attention_of, takes_bounds, why_not_padding_free, why_not_right_padded
from .causal_lm import causal_lm, full_head_parameters, head_parameters, num_token_ids, run_to_head, takes_positions
from .packing import Layout, PackedSequences, lay_out, make_pack, unpack

log = logging.getLogger("logitless")

#: Arguments of the model's forward that are set here, or that change what reaches the head.
_RESERVED = (
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "fused_lm_head",
    "inputs_embeds",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "past_key_values",
    "shift_labels",
    "use_cache",
)
#: Arguments that a forward may accept without naming them in its signature.
_UNNAMED = frozenset({"adapter_names", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits"})


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


def run_packed(model: nn.Module, sequences: Placed, score: Callable[[HeadCall], Any], options: RunOptions) -> Any:
    """Run the model on packed sequences up to its head, and return what ``score`` makes of the head's call.

    The sequences run as one padding-free row or as a right-padded batch: the correct one that costs less.
    """
    packed, layout, positions = sequences
    model_kwargs = options.model_kwargs or {}
    if options.padding_free not in (True, False, None):
        raise TypeError(f"padding_free must be True, False or None, got {options.padding_free!r}")
    for name in _RESERVED:
        if name in model_kwargs:
            raise ValueError(f"{name} is not to be given: what the model gets for it is decided here")
    lm = causal_lm(model)
    if unknown := model_kwargs.keys() - inspect.signature(type(lm).forward).parameters.keys() - _UNNAMED:
        # most models accept any keyword, and ignore those that they do not read
        raise TypeError(f"{type(lm).__name__}.forward takes no argument {', '.join(sorted(unknown))}")
    spec = _spec(lm, options.head, options.temperature)
    reasons = _why_not_one_row(model, lm, options.padding_free, packed, layout.bounds, positions is not None)
    log.debug("packed sequences: %s", f"right-padded batch: {'; '.join(reasons)}" if reasons else "one padding-free row")

    if reasons:
        if wrong := why_not_right_padded(model, lm):
            raise ValueError(f"model cannot be used: {'; '.join(wrong)}")
        inputs, targets, where = _right_padded(lm, packed, positions)
    else:
        inputs = packed.model_inputs(flash_attention=takes_bounds(lm))
        assert packed.labels is not None
        targets, where = packed.labels[None], torch.arange(len(packed.input_ids), device=packed.input_ids.device)
    if not len(packed.input_ids):
        # The model still runs, on one token that is not scored: ranks stay in step, and the result has a gradient of 0.
        inputs, targets = {"input_ids": where.new_zeros(1, 1)}, where.new_full((1, 1), packed.ignore_index)

    def call(hidden: Tensor) -> Any:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"model must pass its head one hidden state per token, {tuple(targets.shape)}, got {tuple(hidden.shape[:-1])}"
            )
        return score(HeadCall(hidden, *full_head_parameters(lm), spec, targets, where))

    return run_to_head(model, lm, {**inputs, **model_kwargs}, call)


def _spec(lm: Any, head: HeadSpec | None, temperature: float | None) -> HeadSpec:
    if head is None:
        return HeadSpec.from_config(lm.config, 1.0 if temperature is None else temperature)
    spec = check_spec(head)
    if temperature is None:
        return spec
    if spec.temperature not in (1.0, temperature):
        raise ValueError(f"temperature={temperature!r} contradicts head.temperature={spec.temperature!r}: pass one of them")
    return spec.with_temperature(temperature)


def _why_not_one_row(
    model: nn.Module,
    lm: Any,
    padding_free: bool | None,
    packed: PackedSequences,
    bounds: list[int],
    other_positions: bool,
) -> list[str]:
    """Why this call does not run as one row; empty when it does."""
    if padding_free is False:
        return ["padding_free=False"]
    if other_positions:  # transformers would take 5, 6, 7 | 8, 9 for one sequence
        reasons = ["position_ids do not start at 0 in each sequence, by which models tell them apart"]
    else:
        reasons = why_not_padding_free(model)
    if reasons and padding_free:
        raise ValueError(f"padding_free=True cannot be had: {'; '.join(reasons)}. Pass None or False for a right-padded batch")
    if reasons or padding_free or attention_of(lm) not in ("eager", "sdpa"):
        return reasons
    sizes = [b - a for a, b in itertools.pairwise(bounds) if b > a]
    width = head_parameters(lm)[0].shape[1]
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
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The model's inputs, shifted labels of their shape, and the place of each token in it, (N,). Empty rows are left out."""
    if positions is not None and not takes_positions(lm):
        raise ValueError(f"position_ids: {type(lm).__name__}.forward takes none")
    compact = packed.cu_seqlens.unique_consecutive()
    pad = getattr(lm.config.get_text_config(), "pad_token_id", None)

    def padded(values: Tensor, value: int) -> Tensor:
        result = unpack(values, compact, padded=True, padding_value=value)
        assert isinstance(result, Tensor)
        return result

    assert packed.labels is not None
    mask = padded(torch.ones_like(packed.input_ids), 0)
    inputs: dict[str, Any] = {
        # RoBERTa-like models derive positions from the pad token; a config may name one that the embedding does not have
        "input_ids": padded(packed.input_ids, pad if isinstance(pad, int) and 0 <= pad < num_token_ids(lm) else 0),
        "attention_mask": mask,
    }
    if positions is not None:
        inputs["position_ids"] = padded(positions, 0)
    return inputs, padded(packed.labels, packed.ignore_index), mask.reshape(-1).nonzero()[:, 0]
