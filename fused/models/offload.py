"""Heads whose weight Accelerate loads only while the head runs (``cpu_offload``, ``disk_offload``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .causal_lm import head_layer


def check_head_is_there(lm: Any) -> None:
    """Raise a ValueError unless the head has its weight, or will have it when it is called and needs no gradient for it."""
    head = head_layer(lm)
    absent = [p for p in head.parameters() if p.is_meta]
    if absent and not any(hasattr(module, "_hf_hook") for module in head.modules()):
        raise ValueError("model's head has its weight on the meta device: load the model's weights first")
    if torch.is_grad_enabled() and any(p.requires_grad for p in absent):
        raise ValueError(
            "model's head is offloaded by Accelerate, which loads a copy of the weight whose gradient would be lost: run the "
            "model under torch.no_grad(), freeze the head, or keep it on a device (device_map)"
        )


@contextmanager
def loaded_head(lm: Any) -> Iterator[None]:
    """The weight of an offloaded head on its device for as long as the context lasts."""
    modules = [module for module in head_layer(lm).modules() if hasattr(module, "_hf_hook")]
    if not modules:
        yield
        return
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield
