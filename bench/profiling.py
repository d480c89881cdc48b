"""One step under torch's profiler: which kernels take the time. On a CPU, which operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: The longest that are kept.
KEPT = 20
#: Characters of a name: those of C++ templates go on for pages.
_NAME = 160


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step (on a CPU: all calls of an operator, without what it calls)."""

    name: str
    calls: int
    microseconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_step(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of a step that take longest, from the longest on; what the profiler itself costs is not among them."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as run:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in run.key_averages():
        if on_gpu and (event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False)):
            continue  # what a CPU did, and spans that others' kernels fill
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append(Kernel(event.key[:_NAME], event.count, float(time)))
    return sorted(found, key=lambda kernel: -kernel.microseconds)[:KEPT]
