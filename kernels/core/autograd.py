"""Decorators around autograd functions and what must not be compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as torch_once_differentiable


@functools.cache
def eagerly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable``, at the first call: as a decorator it would add a second to every import of the package."""
    return torch.compiler.disable(fn)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``, whose graph would lack this node: torch's decorator of that name drops it silently
    when the incoming gradient does not require one.
    """
    first_order = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "logitless has first derivatives only: create_graph=True (a gradient penalty, a Hessian) is not supported; "
                "use reference_logps for that"
            )
        return first_order(ctx, *grads)

    return checked
