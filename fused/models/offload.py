"""Heads whose weight Accelerate loads only while the head runs (``cpu_offload``, ``disk_offload``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def loaded_head(lm: Any) -> Iterator[None]:
    """The weight of the head on its device for as long as the context lasts.

    Raises:
        ValueError: the weight is on the meta device and cannot be loaded, or is loaded but would need a gradient.
    """
    head = lm.get_output_embeddings()
    absent = [p for p in head.parameters() if p.is_meta]
    if not absent:
        yield
        return
    modules = [module for module in head.modules() if hasattr(module, "_hf_hook")]
    if not modules:
        raise ValueError("model's head has its weight on the meta device: load it before the model runs")
    if torch.is_grad_enabled() and any(p.requires_grad for p in absent):
        raise ValueError(
            "model's head is offloaded by Accelerate, whose copy of the weight would lose its gradient: run the model under "
            "torch.no_grad(), freeze the head, or keep it on a device (device_map)"
        )
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield
