"""Checks of arguments that the losses share. Each error names the argument, the value given, and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from logitless.kernels.core.checks import check_local, check_tensor


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number in ``[low, high]``, or ``(low, high]`` with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        bounds = "" if low == -math.inf and high == math.inf else f" in {'(' if open_low else '['}{low}, {high}]"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str] | Mapping[str, Any]) -> str:
    """One of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}")
    return str(value)


def check_data(name: str, value: Any) -> None:
    """A tensor (anything else is left to other checks) that this process can compute on.

    The schedule of a loss depends on the data, so its tensors must have some: meta tensors and FakeTensors have none. For
    tensors of a ``torch.func`` transform and for DTensors see :func:`~logitless.kernels.core.checks.check_local`.
    """
    check_local(name, value)
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return
    fake = isinstance(value, FakeTensor)
    if fake or value.is_meta:
        what = "is a FakeTensor" if fake else "is on meta"
        raise ValueError(f"{name} {what}, which has no data: loss modules compute on real tensors")


def check_per_sequence(name: str, value: Any, count: int, device: torch.device, *, boolean: bool = False) -> Tensor:
    """A floating point (or bool) tensor with one value per sequence; returned detached."""
    check_data(name, value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape [{count}], one value per sequence, got {tuple(value.shape)}")
    if boolean and value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    if not boolean and not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but hidden is on {device}: move one of them")
    return value.detach()


def check_per_token(name: str, value: Any, labels: Tensor, num_sequences: int | None = None) -> Tensor:
    """A floating point tensor shaped like ``labels`` or, with ``num_sequences``, with one value per sequence; detached."""
    check_data(name, value)
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    wanted = [tuple(labels.shape)]
    if num_sequences is not None:
        wanted.append((num_sequences,))
    if tuple(value.shape) not in wanted:
        accepted = " or ".join(map(str, wanted))
        what = "like labels" + (", or one value per sequence" if len(wanted) > 1 else "")
        raise ValueError(f"{name} must have shape {accepted} ({what}), got {tuple(value.shape)}")
    if value.device != labels.device:
        raise ValueError(f"{name} is on {value.device} but labels is on {labels.device}: move one of them")
    detached: Tensor = value.detach()
    return detached
