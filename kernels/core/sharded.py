"""Weights of a head that several ranks share in shards: whether a gradient computed by this rank reaches all of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_state = threading.local()


@contextmanager
def inside_forward() -> Iterator[None]:
    """Mark calls that run in the forward pass of the head's model, which gathers ZeRO-3 weights again in its backward pass."""
    before = getattr(_state, "inside", False)
    _state.inside = True
    try:
        yield
    finally:
        _state.inside = before


def check_reduced(name: str, value: object) -> None:
    """Raise a TypeError for a weight whose gradient would not be reduced over ranks. Compiled code is not checked.

    That is a parameter of DeepSpeed ZeRO-3 outside of its model's forward pass, or ``DTensor.full_tensor()`` without
    ``grad_placements``: its backward pass keeps this rank's rows of this rank's gradient.
    """
    if torch.compiler.is_compiling() or not isinstance(value, Tensor) or not value.requires_grad or not torch.is_grad_enabled():
        return
    if hasattr(value, "ds_id") and not getattr(_state, "inside", False):
        raise TypeError(
            f"{name} is a parameter of DeepSpeed ZeRO-3, which is released before the backward pass, so its gradient would be "
            "lost: call logitless.model_loss, model_logps or at_head with the engine, which gather it again, or use stage 1 or "
            "2"
        )
    if "torch.distributed.tensor" not in sys.modules:
        return
    node: Any = value.grad_fn
    for _ in range(4):  # a cast or a view may follow
        if node is None:
            return
        if type(node).__name__ == "_ToTorchTensorBackward":
            _check_placements(name, node)
            return
        node = node.next_functions[0][0] if node.next_functions else None


def _check_placements(name: str, node: Any) -> None:
    spec = node.dtensor_spec
    whole = all(placement.is_replicate() for placement in spec.placements)  # the local rows of a shard have their own gradient
    if whole and node.grad_placements is None and spec.mesh.size() > 1:
        raise TypeError(
            f"{name} comes from DTensor.full_tensor() without grad_placements, so its gradient is not reduced over the "
            f"{spec.mesh.size()} ranks of its mesh: {ways_out(name)}"
        )


def ways_out(name: str) -> str:
    """What to pass in place of a DTensor weight or bias."""
    return (
        "call logitless.model_loss, model_logps or at_head with the sharded model; or, if ranks have different sequences (data "
        f'parallel, FSDP), pass {name}.full_tensor(grad_placements=[Partial("avg")] * {name}.device_mesh.ndim), whose gradient '
        "is averaged over ranks as FSDP averages its own; if they have the same sequences (tensor parallel), shard weight and "
        'bias by rows over a mesh of one dimension named "tp", or pass '
        f"{name}.full_tensor(grad_placements=[Replicate()] * {name}.device_mesh.ndim)"
    )
