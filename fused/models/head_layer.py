"""The layer that a model applies as its head: what stands in for its weight and bias.

PEFT's and bitsandbytes' layers are recognised by name and by attributes, so neither library is imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from logitless.kernels.core.head_weight import LoRAWeight, Weight
from logitless.kernels.core.quantized_weight import four_bit_rows, int8_rows

_WAYS_OUT = "merge it, or leave the head out of its target modules (modules_to_save=['lm_head'] trains the head whole)"


def head_of(layer: nn.Module, *, gather: bool) -> tuple[Weight, Tensor | None]:
    """Weight (V, H) and bias (V,) of a layer that computes ``hidden @ weight.T + bias``.

    Args:
        layer: a linear layer, plain or quantised, perhaps in PEFT's wrappers.
        gather: whether DTensors (FSDP2) are gathered; ``full_tensor`` is differentiable.

    Raises:
        ValueError: for any other layer, and for adapters that change the head in another way than LoRA does.
    """
    linear: Any = layer
    while not isinstance(linear, nn.Linear):
        inner = _inside(linear)
        if inner is None:
            break
        if isinstance(inner, list):
            return _with_lora(linear, inner, gather)
        linear = inner
    return _linear(linear, gather)


def _inside(wrapper: Any) -> nn.Module | list[str] | None:
    """What a PEFT wrapper applies: another layer, or the names of its active LoRA adapters. ``None``: neither is known."""
    if not hasattr(wrapper, "active_adapters"):
        return None
    off = getattr(wrapper, "disable_adapters", False) or not wrapper.active_adapters
    merged = getattr(wrapper, "merged", False)
    copies = getattr(wrapper, "modules_to_save", None)
    if not off and isinstance(copies, nn.ModuleDict):
        return copies[wrapper.active_adapters[0]]
    if off and merged:
        wrapper.unmerge()  # as its forward pass does, which comes after the head's parameters are read
    if not off and not merged and hasattr(wrapper, "lora_A"):
        if names := [name for name in wrapper.active_adapters if name in wrapper.lora_A]:
            return names
        off = True
    inner = getattr(wrapper, "base_layer" if hasattr(wrapper, "base_layer") else "original_module", None)
    return inner if isinstance(inner, nn.Module) and (off or merged) else None


def _with_lora(wrapper: Any, names: list[str], gather: bool) -> tuple[Weight, Tensor | None]:
    weight, bias = head_of(wrapper.base_layer, gather=gather)
    for name in names:
        variant = getattr(wrapper, "lora_variant", {}).get(name)
        if variant is not None or getattr(wrapper, "use_dora", {}).get(name):
            kind = "Dora" if variant is None else type(variant).__name__.removesuffix("LinearVariant")
            reason = f"of the kind {kind}, another function of the head's input than LoRA's"
            if kind == "Dora":
                reason = "with DoRA, which scales each row of W + B A by its norm and so needs the whole [vocab, hidden] sum"
            raise ValueError(f"model's head has the adapter {name!r} {reason}: {_WAYS_OUT}")
        lora_A, lora_B = wrapper.lora_A[name], wrapper.lora_B[name]
        scaling = wrapper.scaling[name]
        dropout = wrapper.lora_dropout[name]
        weight = LoRAWeight(
            weight,
            _parameter(lora_A.weight, gather),
            _parameter(lora_B.weight, gather),
            scaling,
            None if isinstance(dropout, nn.Identity) else dropout,
        )
        if lora_B.bias is not None:
            own = _parameter(lora_B.bias, gather) * scaling
            bias = own if bias is None else bias + own
    return weight, bias


def _linear(layer: Any, gather: bool) -> tuple[Weight, Tensor | None]:
    kind = type(layer)
    if kind.__module__.startswith("bitsandbytes."):
        weight, bias = layer.weight, layer.bias
        if hasattr(layer, "quant_state"):
            state = getattr(weight, "quant_state", None)
            return four_bit_rows("model's head", weight.data, layer.quant_state if state is None else state), bias
        if hasattr(layer, "state"):
            absmax = getattr(weight, "SCB", None)
            return int8_rows("model's head", weight.data, layer.state.SCB if absmax is None else absmax), bias
    if not isinstance(layer, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise ValueError(f"model's head must be an nn.Linear, got {kind.__module__}.{kind.__name__}{_advice(layer)}")
    return _parameter(layer.weight, gather), None if layer.bias is None else _parameter(layer.bias, gather)


def _advice(layer: Any) -> str:
    if not hasattr(layer, "active_adapters"):
        return ""
    if hasattr(layer, "token_adapter") or "trainable_tokens" in type(layer).__module__:
        return "; trainable_token_indices replaces rows of the head's weight, which is served when it is merged only"
    return f"; an adapter other than LoRA on the head is not served: {_WAYS_OUT}"


def _parameter(parameter: Tensor, gather: bool) -> Tensor:
    if hasattr(parameter, "ds_id"):  # ZeRO-3 releases the gathered weight before the backward pass reads it
        raise ValueError("model's head is sharded by DeepSpeed ZeRO-3, which model_logps does not serve: use stage 1 or 2")
    full_tensor = getattr(parameter, "full_tensor", None)
    return parameter if full_tensor is None or not gather else full_tensor()
