"""Results of a function at the head, connected to the output of the model's forward pass.

DistributedDataParallel, FSDP and DeepSpeed register their backward hooks on the output of a wrapped module: these start the
reduction of gradients, and gather parameters that were resharded after the forward pass. A result that left the model through
a hook would bypass them. So the head returns a *carrier*, logits without rows, and each result depends on the logits of the
model's output. In a backward pass the gradient of these logits (no elements) goes through every wrapper to the carrier, and
only then do the gradients of the results reach the function that computed them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .wrappers import several_ranks


class _Carrier(torch.autograd.Function):
    """The head's output without rows, which depends on the results and gives them no gradient.

    The dependence orders the backward pass: results come after the hooks of every module whose output the carrier was.
    DistributedDataParallel(find_unused_parameters=True) finds the parameters that the results use.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *results: Tensor) -> Tensor:
        ctx.count = len(results)
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * (1 + ctx.count)


class _Ride(torch.autograd.Function):
    """Results unchanged. Their backward pass also gives the model's logits a gradient, of zeros."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.like = logits.shape, {"dtype": logits.dtype, "device": logits.device}
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return torch.zeros(ctx.shape, **ctx.like), *grads


def tensors_with_gradient(result: Any) -> list[Tensor]:
    """Tensors that require a gradient in tensors, dataclasses, and the containers of ``torch.utils._pytree``.

    Raises:
        TypeError: where the process is one of several ranks and another object has such tensors.
    """
    found: list[Tensor] = []
    _walk(result, lambda tensor: found.append(tensor) or tensor, several_ranks())
    return found


def carry(logits: Tensor, results: list[Tensor]) -> Tensor:
    """The carrier, in place of the head's output without rows."""
    carrier: Tensor = _Carrier.apply(logits, *results)
    return carrier


def ride(result: Any, results: list[Tensor], logits: Tensor) -> Any:
    """``result`` with each of ``results``, its tensors that require a gradient, made dependent on the model's logits."""
    new = iter(_Ride.apply(logits, *results))
    return _walk(result, lambda tensor: next(new), False)


def _walk(value: Any, put: Callable[[Tensor], Tensor], strict: bool) -> Any:
    """``value`` with ``put(tensor)`` in place of each tensor that requires a gradient."""
    if isinstance(value, Tensor):
        return put(value) if value.requires_grad else value
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: _walk(part, put, strict) for name, part in fields.items()}
        return dataclasses.replace(value, **new) if any(new[name] is not fields[name] for name in new) else value
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    if len(leaves) == 1 and leaves[0] is value:
        _check_opaque(value, strict)
        return value
    new_leaves = [_walk(leaf, put, strict) for leaf in leaves]
    if all(a is b for a, b in zip(leaves, new_leaves, strict=True)):
        return value
    return pytree.tree_unflatten(new_leaves, spec)


def _check_opaque(value: Any, strict: bool) -> None:
    if not strict or callable(value):
        return
    names = [name for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, Tensor) and part.requires_grad]
    if names:
        raise TypeError(
            f"fn returned a {type(value).__name__} whose {', '.join(names)} needs a gradient, which would not be reduced over "
            "ranks: return tensors, dataclasses, tuples, lists or dicts"
        )
