"""Registers the backend ``triton``, without importing Triton: its functions are imported when they are first called."""

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch

from ..interface import Backend, Call, ElementWise, unsupported
from ..registry import register_backend
from .compat import interpreted, why_no_triton
from .predict import predict, workspace_bytes


def why_not(call: Call) -> list[str]:
    """Every reason why it cannot serve a call."""
    # a plan for a GPU that is not here asks for no device, and interprets nothing
    in_interpreter = call.architecture is None and not why_no_triton() and interpreted()
    reasons = unsupported(call, "cuda", "xpu", *(["cpu"] if in_interpreter else []), filters=True)
    if in_interpreter and torch.bfloat16 in (call.dtype, call.weight_dtype):
        reasons.append("Triton's interpreter computes nothing in bfloat16")
    if call.grad_filter and call.dtype == torch.float64:
        reasons.append(f"grad_filter={call.grad_filter} does not work in float64")
    return reasons


def _entry_point(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(".backend", __package__), name)(*args, **kwargs)

    return function


def _elementwise(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(".elementwise", __package__).TRITON_PASSES, name)(*args, **kwargs)

    return function


# After ``torch``, which serves any call on a CPU: the interpreter runs only by name. On GPUs the order is irrelevant.
register_backend(
    Backend(
        name="triton",
        why_not=why_not,
        why_unavailable=why_no_triton,
        score=_entry_point("score"),
        tile_gradients=_entry_point("tile_gradients"),
        recompute_gradients=_entry_point("recompute_gradients"),
        elementwise=ElementWise(**{f.name: _elementwise(f.name) for f in fields(ElementWise) if f.name != "pair_margins"}),
        predict=predict,
        workspace_bytes=workspace_bytes,
    )
)
