"""Wrappers of a model: what is inside them, and which of them the probes leave out.

DeepSpeed is recognised by the names of its classes and attributes, so it is not imported.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def without_wrappers(model: Any) -> Any:
    """The model inside ``DistributedDataParallel``, ``FullyShardedDataParallel`` or a DeepSpeed engine; a PEFT model is kept.

    Methods are looked up on the class, since FSDP and DeepSpeed engines forward unknown attributes to the model inside.
    """
    while isinstance(model, nn.Module):
        if any(hasattr(type(model), name) for name in ("get_output_embeddings", "get_base_model")):
            break
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def for_probes(model: nn.Module) -> nn.Module:
    """The model without wrappers whose forward pass has collectives that a probe does not need.

    ``DistributedDataParallel`` broadcasts buffers before a forward pass. A DeepSpeed engine gathers the parameters of ZeRO-3 in
    hooks of the modules inside it. FSDP gathers in its own forward pass, so it is kept, and every rank must run the probe.
    """
    while isinstance(model, DistributedDataParallel) or "DeepSpeedEngine" in {kind.__name__ for kind in type(model).__mro__}:
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def several_ranks() -> bool:
    """Whether this process is one of several ranks of the default process group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_wrapper(model: nn.Module, lm: Any) -> None:
    """Raise a ValueError for the inside of a ``FullyShardedDataParallel`` model, whose parameters are flat shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    embedding = lm.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if fsdp is None or not isinstance(weight, Tensor) or weight.dim() != 1 or hasattr(weight, "ds_id"):
        return
    wrappers = (part for part in model.modules() if isinstance(part, fsdp.FullyShardedDataParallel))
    if not any(layer is embedding for wrapper in wrappers for layer in wrapper.modules()):
        raise ValueError(
            f"model has flat shards for parameters, such as the input embedding's of shape {tuple(weight.shape)}: pass the "
            "wrapped model (FullyShardedDataParallel), not its .module"
        )


def check_gathered(name: str, parameter: Tensor) -> None:
    """Raise a ValueError where a parameter of the head is still a shard when the head runs."""
    if parameter.numel() == 0 or (name == "weight" and parameter.dim() != 2):
        raise ValueError(
            f"model's head has a {name} of shape {tuple(parameter.shape)} when it runs, a shard of the whole: pass the wrapped "
            "model (FullyShardedDataParallel, DeepSpeed engine), not its .module; and merge adapters of the head, or leave the "
            "head out of their target modules, where each layer of an adapter is sharded by itself"
        )


def sharded_inside(head: nn.Module) -> str | None:
    """The name of a layer inside the head that is sharded by itself (FSDP2, ZeRO-3), so that it is gathered only while it runs.

    ZeRO-3 gathers every layer by itself, except for small parameters that it keeps (``ds_persist``). Its prefetch may leave a
    parameter incomplete, so the parameter's shape does not decide.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without that module nothing is sharded by it
    for name, layer in head.named_modules():
        own = layer.parameters(recurse=False)
        if layer is not head and (
            (fsdp is not None and isinstance(layer, fsdp.FSDPModule))
            or any(hasattr(p, "ds_id") and not getattr(p, "ds_persist", False) for p in own)
        ):
            return name
    return None
