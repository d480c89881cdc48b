"""Argument checks shared by all public functions. Each error names the argument, the value given, and what is accepted."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from .head_spec import HeadSpec
from .head_weight import LoRAWeight, Weight
from .sharded import check_reduced, ways_out
from .stats import OUTPUTS
from .weight_rows import HeadRows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_local(name: str, value: object) -> None:
    """A tensor must be neither wrapped by a ``torch.func`` transform nor a DTensor. Compiled code is not checked."""
    if torch.compiler.is_compiling() or not isinstance(value, Tensor):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise TypeError(
            f"{name} is a tensor of a torch.func transform (grad, vmap, jvp ...), which logitless does not support: "
            "use loss.backward() or torch.autograd.grad, and pass a batch in place of vmap"
        )
    distributed = sys.modules.get("torch.distributed.tensor")  # without that module there are no DTensors
    if distributed is not None and isinstance(value, distributed.DTensor):
        if name in ("weight", "bias"):
            way_out = ways_out(name)
        else:
            way_out = f"pass {name}.to_local() if it holds this rank's own sequences, else {name}.full_tensor()"
        raise TypeError(f"{name} is a DTensor, but logitless computes on the tensors of one rank: {way_out}")


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype to compute in: the autocast dtype under autocast (float64 stays), else that of ``hidden``."""
    if hidden.dtype != torch.float64 and _autocasts(hidden.device):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # which fails for devices without autocast


def check_head(hidden: Tensor, weight: Weight, bias: Tensor | None, prefix: str = "") -> None:
    """Shapes, dtypes and devices of hidden states (..., H), weight (V, H), which ``read_weight`` has read, and bias (V,)."""
    names = [prefix + name for name in ("hidden", "weight", "bias")]
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        check_local(name, value)
    if not prefix:  # a reference gets no gradient
        check_reduced("weight", weight)
        check_reduced("bias", bias)
    check_tensor(names[0], hidden)
    if isinstance(weight, LoRAWeight):
        for own, tensor in weight.tensors():
            check_local(f"{names[1]}.{own}", tensor)
            if not prefix:
                check_reduced(f"weight.{own}", tensor)
    elif not isinstance(weight, HeadRows):
        check_tensor(names[1], weight)
    if weight.dim() != 2:
        raise ValueError(f"{names[1]} must have shape [vocab, hidden], got {tuple(weight.shape)}")
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"{names[1]} must not be empty, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]} must have shape [..., {weight.shape[1]}] to match {names[1]} {tuple(weight.shape)}, "
            f"got {tuple(hidden.shape)}"
        )
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{names[0]} must be float64, float32, bfloat16 or float16, got {hidden.dtype}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{names[1]} must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    quantised = isinstance(weight.base if isinstance(weight, LoRAWeight) else weight, HeadRows)  # rounded once more is no loss
    if weight.dtype != hidden.dtype and not quantised and not _autocasts(hidden.device):
        wider = torch.promote_types(weight.dtype, hidden.dtype)
        if wider != hidden.dtype:
            raise TypeError(
                f"{names[0]} is {hidden.dtype} but {names[1]} is {weight.dtype}, which would be rounded: pass them in one "
                f"dtype, or run under torch.autocast"
            )
    if bias is not None:
        check_tensor(names[2], bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{names[2]} must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        if bias.dtype not in DTYPES:
            raise TypeError(f"{names[2]} must be floating point (float64, float32, bfloat16 or float16), got {bias.dtype}")
    for name, part in zip(names[1:], (weight, bias), strict=True):
        if part is not None and part.device != hidden.device:
            raise ValueError(f"{name} is on {part.device} but {names[0]} is on {hidden.device}: move one of them")


def check_labels(labels: Tensor, hidden: Tensor, name: str = "labels") -> None:
    """Labels are int32 or int64 and shaped like the hidden states without their last dimension."""
    check_local(name, labels)
    check_tensor(name, labels)
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(hidden.shape[:-1])} like hidden without its last dimension, got "
            f"{tuple(labels.shape)}; labels are given already shifted (see logitless.shift)"
        )
    if labels.device != hidden.device:
        raise ValueError(f"{name} is on {labels.device} but hidden is on {hidden.device}: move one of them")


def check_label_range(labels: Tensor, scored: Tensor, vocab_size: int, ignore_index: int, name: str = "labels") -> None:
    """Every scored label is in [0, vocab_size): an error on a CPU, an asynchronous device assertion on a GPU."""
    bad = scored & ((labels < 0) | (labels >= vocab_size))
    if labels.is_cuda:
        torch._assert_async(~bad.any())
    elif bool(bad.any()):
        values = labels[bad]
        raise ValueError(
            f"{name} must be in [0, {vocab_size}) or ignore_index={ignore_index}, got {int(values[0])} "
            f"({values.numel()} such labels)"
        )


def check_temperature(temperature: Tensor | None, labels: Tensor, head: HeadSpec) -> None:
    """Temperatures of tokens: float32 or float64, shaped like the labels, without gradient, in place of the head's."""
    if temperature is None:
        return
    check_local("temperature", temperature)
    check_tensor("temperature", temperature)
    if temperature.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"temperature must be float32 or float64, got {temperature.dtype}")
    if temperature.shape != labels.shape:
        raise ValueError(f"temperature must have shape {tuple(labels.shape)} like labels, got {tuple(temperature.shape)}")
    if temperature.device != labels.device:
        raise ValueError(f"temperature is on {temperature.device} but labels is on {labels.device}: move one of them")
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient, which logitless does not compute: pass temperature.detach()")
    if head.temperature != 1.0:
        raise ValueError(f"temperature is given beside head.temperature={head.temperature}: pass one of them")


def check_temperature_range(temperature: Tensor) -> None:
    """Temperatures of scored tokens are positive and finite: an error on a CPU, an asynchronous assertion on a GPU."""
    good = (temperature > 0) & (temperature < float("inf"))
    if temperature.is_cuda:
        torch._assert_async(good.all(), "temperature must be finite and > 0 at every scored position")
    elif not bool(good.all()):
        values = temperature[~good]
        raise ValueError(
            f"temperature must be finite and > 0 at every scored position, got {values[0].item()} "
            f"({values.numel()} such values)"
        )


def check_token_weights(token_weights: Tensor, labels: Tensor) -> None:
    """Token weights are floating point and shaped like the labels."""
    check_tensor("token_weights", token_weights)
    if not token_weights.is_floating_point():
        raise TypeError(f"token_weights must be floating point, got {token_weights.dtype}")
    if token_weights.shape != labels.shape:
        raise ValueError(f"token_weights must have shape {tuple(labels.shape)} like labels, got {tuple(token_weights.shape)}")
    if token_weights.device != labels.device:
        raise ValueError(f"token_weights is on {token_weights.device} but labels is on {labels.device}: move one of them")


def check_spec(head: HeadSpec | None) -> HeadSpec:
    if head is None:
        return HeadSpec()
    if not isinstance(head, HeadSpec):
        raise TypeError(f"head must be a logitless.HeadSpec, got {type(head).__name__}")
    return head


def check_entries(head: HeadSpec, weight: Weight, name: str = "weight") -> None:
    """A padded head has at least ``head.vocab_size`` rows."""
    if head.vocab_size is not None and head.vocab_size > weight.shape[0]:
        raise ValueError(
            f"head.vocab_size must be at most {weight.shape[0]}, the number of rows of {name}, got {head.vocab_size}"
        )


def check_outputs(outputs: Iterable[str]) -> frozenset[str]:
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs) if isinstance(outputs, Iterable) else (outputs,)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        raise ValueError(f"outputs must be a non-empty subset of {OUTPUTS}, got {names!r}")
    return frozenset(names)


def check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


def _check_cu_seqlens_form(cu_seqlens: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 of shape [num_sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> list[int]:
    """``cu_seqlens`` is int32 or int64 of shape [S + 1], rises from 0 to ``num_tokens``. Returns its values."""
    _check_cu_seqlens_form(cu_seqlens)
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != num_tokens or any(a > b for a, b in zip(values, values[1:], strict=False)):
        shown = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
        raise ValueError(f"cu_seqlens must start at 0, never fall, and end at the token count {num_tokens}, got {shown}")
    return values


def checked_offsets(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """``cu_seqlens`` checked as :func:`check_cu_seqlens` does, int64, on that device. (S + 1,).

    A graph cannot depend on its values: in compiled code the check of these is an assertion that runs with the graph.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(check_cu_seqlens(cu_seqlens, num_tokens, device), device=device)
    _check_cu_seqlens_form(cu_seqlens)
    offsets = cu_seqlens.to(device, torch.long)
    right = (offsets[0] == 0) & (offsets[-1] == num_tokens) & (offsets[1:] >= offsets[:-1]).all()
    torch._assert_async(right, "cu_seqlens must start at 0, never fall, and end at the token count")
    return offsets
