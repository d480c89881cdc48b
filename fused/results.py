"""What a loss function returned: checks and means, for both families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_returned(losses: object, others: Mapping[str, object], count: int, what: str) -> None:
    """``losses`` and the ``others``, by name, are floating point tensors with one value per unit. ``what`` describes a unit."""
    for name, value in {"losses": losses, **others}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss function returned {name} of type {type(value).__name__}; it must be a torch.Tensor")
        if tuple(value.shape) != (count,) or not value.is_floating_point():
            raise ValueError(
                f"the loss function returned {name} of shape {tuple(value.shape)} and {value.dtype}; it must be floating point "
                f"with one value per {what}: ({count},)"
            )


def check_leaves(losses: Tensor, leaves: Sequence[Tensor]) -> None:
    """Only token statistics get gradients: a parameter inside of a loss function would silently get none."""
    seen, todo = set(), [losses.grad_fn] if losses.grad_fn is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"the loss function uses a tensor of shape {tuple(variable.shape)} that requires a gradient, which it would "
                "not get: detach it, or write the loss with linear_logps or sequence_logps"
            )
        todo += [parent for parent, _ in node.next_functions if parent is not None]


def mean_or_zero(values: Tensor) -> Tensor:
    """The mean; 0 of nothing."""
    return values.sum() / max(1, len(values))
