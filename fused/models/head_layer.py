"""The layer that a model applies as its head: what stands in for its weight and bias.

PEFT's and bitsandbytes' layers are recognised by name and by attributes, so neither library is imported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from logitless.kernels.core.head_weight import LoRAWeight, Weight
from logitless.kernels.core.quantized_weight import four_bit_rows, int8_rows

from .wrappers import check_gathered, sharded_inside

_WAYS_OUT = "merge it, or leave the head out of its target modules (modules_to_save=['lm_head'] trains the head whole)"


def head_of(layer: nn.Module, *, gather: bool) -> tuple[Weight, Tensor | None]:
    """Weight (V, H) and bias (V,) of a layer that computes ``hidden @ weight.T + bias``.

    Args:
        layer: a linear layer, plain or quantised, perhaps in PEFT's wrappers.
        gather: whether the parameters are read: DTensors of a tensor-parallel mesh are gathered (``full_tensor`` is
            differentiable), and shards of other kinds are refused. FSDP and ZeRO-3 gather the head's parameters while it runs.

    Raises:
        ValueError: for any other layer, for adapters that change the head in another way than LoRA does, and for parameters
            that are not gathered while the head runs.
    """
    if gather and (inside := sharded_inside(layer)) is not None:
        raise ValueError(
            f"model's head has the layer {inside}, whose parameters are gathered only while it runs: with FSDP2, call "
            "fully_shard on the whole head, or leave it to the group of the model; with ZeRO-3, merge the adapter of the head, "
            "or leave the head out of its target modules and modules_to_save"
        )
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
        if not gather and any(part.dim() != 2 for part in (weight, lora_A.weight, lora_B.weight)):
            if weight.requires_grad:
                raise ValueError("model's head has an adapter on a weight that requires a gradient: freeze it (requires_grad_)")
            continue  # shards
        if isinstance(weight, Tensor) and weight.grad_fn is not None:
            weight = weight.detach()  # FSDP1 gives a view of its flat parameter, which other parameters train
        scaling = wrapper.scaling[name]
        dropout = wrapper.lora_dropout[name]
        weight = LoRAWeight(
            weight,
            _parameter("weight", lora_A, gather),
            _parameter("weight", lora_B, gather),
            scaling,
            None if isinstance(dropout, nn.Identity) else dropout,
        )
        if lora_B.bias is not None:
            own = _parameter("bias", lora_B, gather) * scaling
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
    return _parameter("weight", layer, gather), None if layer.bias is None else _parameter("bias", layer, gather)


def _advice(layer: Any) -> str:
    if not hasattr(layer, "active_adapters"):
        return ""
    if hasattr(layer, "token_adapter") or "trainable_tokens" in type(layer).__module__:
        return "; trainable_token_indices replaces rows of the head's weight, which is served when it is merged only"
    return f"; an adapter other than LoRA on the head is not served: {_WAYS_OUT}"


def _parameter(name: str, layer: nn.Module, gather: bool) -> Tensor:
    parameter: Tensor = getattr(layer, name)
    if not gather:
        return parameter
    check_gathered(name, parameter)
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Replicate

    # Ranks of a tensor-parallel mesh have the same tokens, so the same gradient.
    return parameter.full_tensor(grad_placements=[Replicate()] * parameter.device_mesh.ndim)
