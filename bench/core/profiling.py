"""One step under torch's profiler: which kernels take the time. On a CPU, which operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

#: Kernels that are kept, and characters of a name: C++ templates have names of pages.
KEPT, _NAME = 20, 160


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step (on a CPU: all calls of an operator, without what it calls)."""

    name: str
    calls: int
    microseconds: float


def profile_step(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of a step that take longest, longest first; the profiler's own cost is not included."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as run:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in run.key_averages():
        if on_gpu and (event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False)):
            continue  # CPU work, and annotations that contain other kernels
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append(Kernel(event.key[:_NAME], event.count, float(time)))
    return sorted(found, key=lambda kernel: -kernel.microseconds)[:KEPT]
