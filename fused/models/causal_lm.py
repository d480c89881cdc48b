"""The causal language model inside its wrappers, its head, and a forward pass that stops at the head."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from logitless.kernels.core.head_weight import Weight
from logitless.kernels.core.sharded import inside_forward

from .carrier import carry, ride, tensors_with_gradient
from .head_layer import head_of
from .wrappers import check_gathered, check_wrapper, several_ranks, without_wrappers


def causal_lm(model: nn.Module) -> Any:
    """The ``transformers`` causal language model inside wrappers (PEFT, DistributedDataParallel, FSDP, a DeepSpeed engine).

    Raises:
        TypeError, ValueError: the model is no causal language model, has a prompt-learning adapter, is compiled together with
            its head, or has a head that is not linear, see :func:`~logitless.fused.models.head_layer.head_of`.
    """
    lm: Any = without_wrappers(model)
    if not isinstance(lm, nn.Module) or not hasattr(lm, "get_output_embeddings") or not hasattr(lm, "config"):
        raise TypeError(f"model must be a transformers causal language model, got {type(lm).__name__}")
    if callable(get_base_model := getattr(lm, "get_base_model", None)):
        adapter: Any = lm.active_peft_config
        if adapter.is_prompt_learning:
            raise ValueError(
                f"model has a prompt-learning adapter ({adapter.peft_type}), which adds tokens of its own: model_logps serves "
                "adapters that keep the tokens, such as LoRA"
            )
        lm = without_wrappers(get_base_model())
    if any(getattr(config, "is_encoder_decoder", False) for config in (lm.config, lm.config.get_text_config())):
        raise ValueError(f"model must be a causal language model, got the encoder-decoder {type(lm).__name__}")
    for part in (model, lm, lm.get_output_embeddings()):
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model is compiled together with its head, which cannot be left out then: compile the decoder alone, as in "
                "model.model.compile()"
            )
    check_wrapper(model, lm)
    check_head_layer(lm)
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


def head_layer(lm: Any) -> Any:
    """The module that computes the logits, without an FSDP wrapper of its own."""
    return without_wrappers(lm.get_output_embeddings())


def head_width(lm: Any) -> int:
    """H, the size of the head's input; also where the head's weight is sharded."""
    return int(head_layer(lm).in_features)


def check_head_layer(lm: Any) -> None:
    """Raise a ValueError unless the head computes ``hidden @ weight.T + bias``."""
    head = head_layer(lm)
    if head is None:
        raise ValueError(f"model must have a head, but {type(lm).__name__}.get_output_embeddings() is None")
    head_of(head, gather=False)


def head_parameters(lm: Any) -> tuple[Weight, Tensor | None]:
    """Weight (V, H) and bias (V,) of the head; called in a hook of the head, where its parameters are gathered.

    With LoRA on the head the weight is a :class:`logitless.LoRAWeight`; a quantised weight is read by rows. DTensors of a
    tensor-parallel mesh are gathered.
    """
    return head_of(head_layer(lm), gather=True)


def run_to_head(model: nn.Module, lm: Any, inputs: dict[str, Any], score: Callable[[Tensor], Any]) -> Any:
    """Run the model up to its head and return ``score(hidden)``, where ``hidden`` is the head's input."""
    return run_model(model, lm, inputs, score)[0]


def run_model(model: nn.Module, lm: Any, inputs: dict[str, Any], score: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """Run the model with ``score`` in place of its head; returns ``score(hidden)`` and the model's output.

    A hook on the head passes it no rows, so the logits of the output have none. Calling the decoder alone would skip the
    wrappers of the model, what the model does to its hidden states before the head, and the autocast state in which the head
    runs. Tensors of the result that require a gradient depend on the logits of the output, see
    :mod:`~logitless.fused.models.carrier`.
    """
    if inputs.get("adapter_names") is not None and hasattr(head_layer(lm), "lora_A"):
        raise ValueError("adapter_names is given, and the model's head has adapters: one batch for each adapter is served only")
    results: list[Any] = []
    leaves: list[Tensor] = []
    owner, scoring = threading.get_ident(), False
    name = type(lm).__name__

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal scoring
        if threading.get_ident() != owner or scoring:  # a run of the model inside ``score`` has hooks of its own
            return None
        if not args:
            raise ValueError(f"model must pass its head the hidden states as its first argument, but {name} passes keywords")
        hidden, *rest = args
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            check_gathered("weight", weight)
        scoring = True
        try:
            with inside_forward():
                results.append(score(hidden))
        finally:
            scoring = False
        leaves[:] = tensors_with_gradient(results[-1])
        if any(leaf is parameter for leaf in leaves for parameter in module.parameters()):
            raise ValueError("fn must not return the head's weight or bias, which a wrapper may release: compute with it in fn")
        return (hidden[..., :0, :], *rest)

    def after(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if threading.get_ident() != owner or scoring or not leaves or not isinstance(output, Tensor):
            return None
        return carry(output, leaves)

    head = head_layer(lm)
    # The hook that runs after the head comes before those of wrappers, which then see the carrier.
    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after, prepend=True)]
    try:
        output = model(**inputs, use_cache=False)  # with a cache, transformers does not tell packed sequences apart
    finally:
        for handle in handles:
            handle.remove()
    if len(results) != 1:
        raise ValueError(f"model must call its head once in a forward pass, but {name} did {len(results)} times")
    if not leaves:
        return results[0], output
    logits = first_tensor(output, "logits")
    if logits is None or not logits.requires_grad:
        if several_ranks():
            raise ValueError(
                f"model must return the logits of its head, but the forward pass of {type(model).__name__} returned none with "
                "a gradient: gradients of its parameters could not be reduced over ranks"
            )
        return results[0], output
    return ride(results[0], leaves, logits), output


def first_tensor(output: Any, name: str) -> Tensor | None:
    """A field of a model's output; its first tensor where that is a tuple. DTensors are gathered."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if found is None and isinstance(output, tuple):
        found = next((value for value in output if isinstance(value, Tensor)), None)
    full_tensor = getattr(found, "full_tensor", None)
    found = full_tensor() if full_tensor is not None else found
    return found if isinstance(found, Tensor) else None


def check_head_input(lm: Any, hidden: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the head's input has one hidden state per token of a batch of this shape."""
    if tuple(hidden.shape[:-1]) != tuple(shape):
        raise ValueError(
            f"model cannot be used: it must pass its head one hidden state per token, {(*shape, hidden.shape[-1])}, but "
            f"{type(lm).__name__} passes {tuple(hidden.shape)}"
        )
