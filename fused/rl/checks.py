"""Checks of arguments that hold one value per token or per segment."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.kernels.core.checks import check_tensor


def check_float(name: str, value: object) -> None:
    """Raise unless ``value`` is a floating point tensor."""
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def check_like(name: str, value: object, like: Tensor, like_name: str, *, boolean: bool = False) -> None:
    """Raise unless ``value`` is a floating point (or bool) tensor of the shape and on the device of ``like``."""
    if boolean:
        check_tensor(name, value)
        assert isinstance(value, Tensor)
        if value.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {value.dtype}: pass {name}.bool()")
    else:
        check_float(name, value)
    assert isinstance(value, Tensor)
    if value.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)} like {like_name}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}: move one of them")


def check_one_each(name: str, value: object, count: int, device: torch.device) -> None:
    """Raise unless ``value`` is a floating point tensor with one value per segment."""
    check_float(name, value)
    assert isinstance(value, Tensor)
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape [{count}], one value per segment, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the tokens are on {device}: move one of them")


def check_rate(name: str, value: object) -> float:
    """A number from 0 to 1; raises for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)
