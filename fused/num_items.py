"""What a loss divides by: the counts of a call, or those of a whole optimiser step (``num_items_in_batch``).

If every micro-batch of a step divides by the counts of the step, its losses and gradients add up to those of one batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .checks import check_data, check_number

NAME = "num_items_in_batch"


class Counted(NamedTuple):
    """What a loss divides by, in words; ``None`` for a count that it does not use.

    Attributes:
        units: ``"pairs"`` or ``"sequences"``.
        tokens: which tokens.
    """

    units: str | None
    tokens: str | None


class NumItems(NamedTuple):
    """The counts of a whole optimiser step; ``None`` for a count that the loss does not use, or that was not given."""

    units: Tensor | float | None = None
    tokens: Tensor | float | None = None

    def checked(
        self, any_units: bool, any_tokens: bool, device: torch.device, dtype: torch.dtype, name: str = NAME
    ) -> NumItems:
        """The counts after :func:`check_num_items`; tensors in the given dtype and on the device.

        Args:
            any_units, any_tokens: whether the call itself has scored tokens that each count covers.
        """

        def check(count: Tensor | float | None, any_scored: bool) -> Tensor | float | None:
            count = None if count is None else check_num_items(count, any_scored, name)
            return count.to(device, dtype) if isinstance(count, Tensor) else count

        return NumItems(check(self.units, any_units), check(self.tokens, any_tokens))


#: The loss divides by the counts of the call.
OF_CALL = NumItems()


def read_num_items(value: Any, counted: Counted, name: str = NAME) -> NumItems:
    """The argument ``num_items_in_batch`` of a loss: one number where the loss has one count, or ``(units, tokens)``.

    Raises:
        TypeError, ValueError: for anything else; values are checked by :meth:`NumItems.checked`.
    """
    if value is None:
        return OF_CALL
    check_data(name, value)
    if isinstance(value, Tensor) and value.shape == (2,):
        value = value.detach().unbind()
    if isinstance(value, (tuple, list)) and len(value) == 2:
        units, tokens = (_one_number(name, v) for v in value)
        return NumItems(None if counted.units is None else units, None if counted.tokens is None else tokens)
    number = _one_number(name, value)
    if counted.units is None:
        return NumItems(tokens=number)
    if counted.tokens is None:
        return NumItems(units=number)
    raise ValueError(
        f"{name} must be two numbers for this loss, which divides by {counted.units} and by {counted.tokens}: pass "
        f"(units, tokens), the sum of count_items over the micro-batches of the step; got {value!r}"
    )


def _one_number(name: str, value: Any) -> Tensor | float:
    if isinstance(value, Tensor):
        return as_number(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be one number, or two: (units, tokens), got {value!r}")
    return value


def as_number(name: str, value: Tensor) -> Tensor:
    """A tensor with one number, 0-dim and detached."""
    check_data(name, value)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(
            f"{name} must be one number, or two: (units, tokens), got a tensor of {value.dtype} and shape {tuple(value.shape)}"
        )
    return value.detach().reshape(())


def check_num_items(num_items: Tensor | float, any_scored: bool, name: str = NAME) -> Tensor | float:
    """One count: finite and positive, or 0 if the call has no scored token that it covers.

    Returns a float for a number and for a tensor on a CPU. The value of a CUDA tensor is checked by a device assertion.
    """
    if not isinstance(num_items, Tensor):
        return check_number(name, num_items, 0, open_low=any_scored)
    number = as_number(name, num_items)
    if number.device.type == "cpu":
        return check_number(name, number.item(), 0, open_low=any_scored)
    if number.is_cuda:
        valid = number > 0 if any_scored else number >= 0
        torch._assert_async(valid & number.isfinite(), f"{name} must be a finite number above 0")
    return number


@overload
def over(value: Tensor, count: Tensor | float) -> Tensor: ...


@overload
def over(value: Tensor | float, count: Tensor | float) -> Tensor | float: ...


def over(value: Tensor | float, count: Tensor | float) -> Tensor | float:
    """``value / count``; 0 for a count of 0. Counts between 0 and 1 are taken as 1."""
    if isinstance(count, Tensor):
        return value / count.clamp(min=1) * (count > 0)
    return value / max(1.0, count) if count > 0 else value * 0.0


def item_counts(units: int, tokens: Tensor | int, device: torch.device) -> Tensor:
    """The result of ``count_items``: units and tokens, (2,) float64 (float32 on devices that have no float64)."""
    counts = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    counts[0], counts[1] = units, tokens
    return counts
