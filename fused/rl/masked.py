"""Means, variances and whitening over the values that a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_bool, check_number
from .checks import check_float, check_like


def _kept(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """The values in float64, 0 where they are masked, and the number of kept values."""
    check_float("values", values)
    wide = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    if mask is None:
        return wide, values.numel()
    check_like("mask", mask, values, "values", boolean=True)
    return torch.where(mask, wide, 0), mask.sum()


def _at_least_two(count: Tensor | int, mask: Tensor | None, what: str) -> None:
    if int(count) < 2:
        name = "values" if mask is None else "mask"
        raise ValueError(f"{name} must leave at least 2 values for {what}, got {int(count)}")


def _moments(values: Tensor, mask: Tensor | None, unbiased: bool, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The values minus their mean, 0 where they are masked; mean and variance, 0-dim."""
    wide, count = _kept(values, mask)
    if unbiased:
        _at_least_two(count, mask, what)
    total = count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
    mean = wide.sum() / total
    centered = wide - mean if mask is None else torch.where(mask, wide - mean, 0)
    return centered, mean, centered.square().sum() / (total - 1 if unbiased else total)


def _dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the values that the mask keeps; 0 if it keeps none. Differentiable.

    Args:
        values: floating point, any shape. Masked values are ignored, NaN included.
        mask: bool, like ``values``.

    Returns:
        Tensor: 0-dim, in the dtype of the values, at least float32; summed in float64.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    wide, count = _kept(values, mask)
    total = count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
    return (wide.sum() / total).to(_dtype(values))


def masked_var(values: Tensor, mask: Tensor | None = None, *, unbiased: bool = True) -> Tensor:
    """Variance of the values that the mask keeps. Differentiable.

    Args:
        values: floating point, any shape. Masked values are ignored, NaN included.
        mask: bool, like ``values``.
        unbiased: divide by the number of kept values minus 1. Otherwise by their number; the variance of no values is then 0.

    Returns:
        Tensor: 0-dim, in the values' dtype, at least float32; computed in float64.

    Raises:
        TypeError, ValueError: naming the argument; for an unbiased variance of fewer than two values.

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    check_bool("unbiased", unbiased)
    return _moments(values, mask, unbiased, "an unbiased variance")[2].to(_dtype(values))


def masked_whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the values that the mask keeps to variance 1 and shift their mean to 0. Differentiable.

    ``(values - mean) / sqrt(var + eps)`` with the unbiased variance, as verl's and TRL's ``masked_whiten``.

    Args:
        values: floating point, any shape. Masked values are ignored, NaN included.
        mask: bool, like ``values``.
        shift_mean: False keeps the mean.
        eps: added to the variance, above 0.

    Returns:
        Tensor: shaped like ``values``, in their dtype, at least float32; 0 at masked positions.

    Raises:
        TypeError, ValueError: naming the argument; for fewer than two values.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    check_bool("shift_mean", shift_mean)
    eps = check_number("eps", eps, 0, open_low=True)
    centered, mean, variance = _moments(values, mask, True, "whitening")
    whitened = centered * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + (mean if mask is None else torch.where(mask, mean, 0))
    return whitened.to(_dtype(values))
