"""Keyword arguments of a model's forward: reserved ones, values per token, and data of images or of rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .layout import Layout

#: Arguments of the model's forward that are set here, or that change what reaches the head.
_RESERVED = frozenset(
    {
        "attention_mask",
        "cache",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "fused_lm_head",
        "input_ids",
        "inputs_embeds",
        "is_causal",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_logits_to_keep",
        "past_key_values",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
#: Arguments that a forward may accept without naming them in its signature.
_UNNAMED = frozenset({"adapter_names", "output_attentions", "output_hidden_states", "output_router_logits"})
#: Arguments of transformers with one value per token, and the number of dimensions of each value.
_PER_TOKEN = {
    "cross_attention_mask": 2,
    "image_attention_mask": 1,
    "image_embeds_position_mask": 0,
    "input_mask": 0,
    "input_pronunciation_ids": 0,
    "input_shape_ids": 0,
    "langs": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
    "per_layer_inputs": 2,
    "task_type_ids": 0,
    "token_type_ids": 0,
}
#: Parts of names of arguments that never hold one value per token, whatever their shape.
_NOT_PER_TOKEN = (
    "adapter",
    "audio",
    "encoder",
    "feature",
    "grid",
    "image",
    "input_values",
    "padding_mask",
    "patch",
    "pixel",
    "protein",
    "qformer",
    "ratio",
    "size",
    "tile",
    "video",
    "vision",
)
#: Parts of names in a config whose value is the id of a token that stands for an image, a video or a sound.
_MEDIA_TOKENS = ("audio", "boi", "boa", "eoi", "eoa", "image", "media", "video", "vision")


class ModelKwargs(NamedTuple):
    """Keyword arguments of a model's forward.

    Attributes:
        per_token: values (N, ...) in the order of the packed tokens; laid out with the token ids.
        others: passed on unchanged.
        of_rows: names of ``others`` that hold data of images or of whole sequences: the sequences must be rows of a batch.
    """

    per_token: dict[str, Tensor]
    others: dict[str, Any]
    of_rows: list[str]


def read_kwargs(lm: Any, kwargs: Mapping[str, Any], layout: Layout) -> ModelKwargs:
    """Check the caller's keyword arguments, and take values per token out of the caller's layout.

    Raises:
        TypeError: an argument that the model's forward does not take, or a required one that is missing.
        ValueError: a reserved argument, values per token in another layout than the token ids, or data of rows beside a
            sequence without tokens.
    """
    for name in sorted(_RESERVED & kwargs.keys()):
        raise ValueError(f"{name} is not to be given: what the model gets for it is decided here")
    parameters = inspect.signature(type(lm).forward).parameters
    if unknown := kwargs.keys() - parameters.keys() - _UNNAMED:
        # most models accept any keyword, and ignore those that they do not read
        raise TypeError(f"{type(lm).__name__}.forward takes no argument {', '.join(sorted(unknown))}")
    if missing := [name for name in required_arguments(lm) if name not in kwargs]:
        raise TypeError(
            f"{type(lm).__name__}.forward requires {', '.join(missing)}: pass it as a keyword (model_loss: in model_kwargs)"
        )
    result = ModelKwargs({}, {}, [])
    for name, value in kwargs.items():
        if _is_per_token(name, value, layout):
            result.per_token[name] = layout.select(name, value)
            continue
        result.others[name] = value
        if value is not None and not isinstance(value, (bool, int, float, str)):
            result.of_rows.append(name)
    if result.of_rows and not (layout.sizes and all(layout.sizes)):
        raise ValueError(f"{', '.join(result.of_rows)}: each sequence must have at least one token, got lengths {layout.sizes}")
    return result


def required_arguments(lm: Any) -> list[str]:
    """Arguments without a default of the model's forward, ``input_ids`` left out."""
    parameters = list(inspect.signature(type(lm).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [p.name for p in named if p.default is p.empty and p.name != "input_ids"]


def is_composite(lm: Any) -> bool:
    """Whether the model is a text model inside one that takes images or the like."""
    return lm.config.get_text_config() is not lm.config


def media_token_ids(lm: Any) -> set[int]:
    """Ids of the tokens that stand for an image, a video or a sound, by the names in the config."""
    return {
        value
        for config in (lm.config, lm.config.get_text_config())
        for name, value in vars(config).items()
        if isinstance(value, int)
        and name.endswith(("_token_id", "_token_index"))
        and any(part in name for part in _MEDIA_TOKENS)
    }


def _is_per_token(name: str, value: Any, layout: Layout) -> bool:
    if value is None:
        return False
    if (dims := _PER_TOKEN.get(name)) is not None:
        # masks between tokens and images: of other models, an argument of the same name and other dimensions is no such mask
        return dims == 0 or layout.kind == "list" or value.dim() - dims in layout.token_dims
    if any(part in name for part in _NOT_PER_TOKEN):
        return False
    return layout.follows(value)
