"""The causal language model inside its wrappers, its head, and a forward pass that stops at the head."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from logitless.kernels.core.head_weight import Weight

from .head_layer import head_of


def causal_lm(model: nn.Module) -> Any:
    """The ``transformers`` causal language model inside wrappers (PEFT, DistributedDataParallel and the like).

    Raises:
        TypeError, ValueError: the model is no causal language model, has a prompt-learning adapter, is compiled together with
            its head, or has a head that is not linear, see :func:`~logitless.fused.models.head_layer.head_of`.
    """
    lm: Any = model
    while isinstance(lm, nn.Module) and not hasattr(lm, "get_output_embeddings") and hasattr(lm, "module"):
        lm = lm.module
    if not isinstance(lm, nn.Module) or not hasattr(lm, "get_output_embeddings") or not hasattr(lm, "config"):
        raise TypeError(f"model must be a transformers causal language model, got {type(lm).__name__}")
    if callable(get_base_model := getattr(lm, "get_base_model", None)):
        adapter: Any = lm.active_peft_config
        if adapter.is_prompt_learning:
            raise ValueError(
                f"model has a prompt-learning adapter ({adapter.peft_type}), which adds tokens of its own: model_logps serves "
                "adapters that keep the tokens, such as LoRA"
            )
        lm = get_base_model()
    if any(getattr(config, "is_encoder_decoder", False) for config in (lm.config, lm.config.get_text_config())):
        raise ValueError(f"model must be a causal language model, got the encoder-decoder {type(lm).__name__}")
    for part in (model, lm, lm.get_output_embeddings()):
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model is compiled together with its head, which cannot be left out then: compile the decoder alone, as in "
                "model.model.compile()"
            )
    head_parameters(lm)
    return lm


def takes_positions(lm: Any) -> bool:
    """Whether the model's forward takes ``position_ids``."""
    return "position_ids" in inspect.signature(type(lm).forward).parameters


def num_token_ids(lm: Any) -> int:
    """How many token ids the model embeds: the rows of its input embedding.

    ``config.vocab_size`` can be larger, after the config was enlarged or the embedding was resized without the other.
    """
    embedding = lm.get_input_embeddings()
    # the number of rows that the layer was made with: the weight of a sharded layer may be flat or empty
    rows = getattr(embedding, "num_embeddings", None)
    if isinstance(rows, int):
        return rows
    if not isinstance(getattr(embedding, "weight", None), Tensor):
        raise ValueError(f"model must embed one token id per position, got the input embedding {type(embedding).__name__}")
    return embedding.weight.shape[0]


def head_parameters(lm: Any) -> tuple[Weight, Tensor | None]:
    """Weight (V, H) and bias (V,) of the head, after a check that the head computes ``hidden @ weight.T + bias``.

    With LoRA on the head the weight is a :class:`logitless.LoRAWeight`; a quantised weight is read by rows.
    """
    head = lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must have a head, but {type(lm).__name__}.get_output_embeddings() is None")
    return head_of(head, gather=False)


def full_head_parameters(lm: Any) -> tuple[Weight, Tensor | None]:
    """:func:`head_parameters`, gathered where FSDP2 shards them as DTensors."""
    return head_of(lm.get_output_embeddings(), gather=True)


def run_to_head(model: nn.Module, lm: Any, inputs: dict[str, Any], score: Callable[[Tensor], Any]) -> Any:
    """Run the model up to its head and return ``score(hidden)``, where ``hidden`` is the head's input."""
    return run_model(model, lm, inputs, score)[0]


def run_model(model: nn.Module, lm: Any, inputs: dict[str, Any], score: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """Run the model with ``score`` in place of its head; returns ``score(hidden)`` and the model's output.

    A hook on the head passes it no rows, so the logits of the output have none. Calling the decoder alone would skip the
    wrappers of the model, what the model does to its hidden states before the head, and the autocast state in which the head
    runs.
    """
    if inputs.get("adapter_names") is not None and hasattr(lm.get_output_embeddings(), "lora_A"):
        raise ValueError("adapter_names is given, and the model's head has adapters: one batch for each adapter is served only")
    results: list[Any] = []
    owner, scoring = threading.get_ident(), False
    name = type(lm).__name__

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal scoring
        if threading.get_ident() != owner or scoring:  # a run of the model inside ``score`` has a hook of its own
            return None
        if not args:
            raise ValueError(f"model must pass its head the hidden states as its first argument, but {name} passes keywords")
        hidden, *rest = args
        scoring = True
        try:
            results.append(score(hidden))
        finally:
            scoring = False
        return (hidden[..., :0, :], *rest)

    handle = lm.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        output = model(**inputs, use_cache=False)  # with a cache, transformers does not tell packed sequences apart
    finally:
        handle.remove()
    if len(results) != 1:
        raise ValueError(f"model must call its head once in a forward pass, but {name} did {len(results)} times")
    return results[0], output


def check_head_input(lm: Any, hidden: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the head's input has one hidden state per token of a batch of this shape."""
    if tuple(hidden.shape[:-1]) != tuple(shape):
        raise ValueError(
            f"model cannot be used: it must pass its head one hidden state per token, {(*shape, hidden.shape[-1])}, but "
            f"{type(lm).__name__} passes {tuple(hidden.shape)}"
        )
