"""The registry of backends. Each says which calls it cannot serve, and why; ``auto`` takes the first that can."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import cpu_backend, torch_backend
from .native import why_no_cpu_extension, why_no_cuda_extension
from .native_scan import NATIVE_PASSES
from .settings import current_settings

log = logging.getLogger("logitless")


@dataclass(frozen=True)
class Call:
    """What a backend is asked to serve."""

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype


@dataclass(frozen=True)
class Backend:
    """One implementation of the core; see ``kernels/torch_backend.py`` for the meaning of the three functions.

    Attributes:
        name: what ``settings(backend=...)`` calls it.
        why_not: every reason why it cannot serve a call; empty when it can.
        why_unavailable: every reason why it cannot run on this machine at all.
    """

    name: str
    why_not: Callable[[Call], list[str]]
    why_unavailable: Callable[[], list[str]]
    score: Callable[..., Any]
    tile_gradients: Callable[..., None]
    recompute_gradients: Callable[..., None]


_registry: dict[str, Backend] = {}


def register_backend(backend: Backend, *, first: bool = False) -> None:
    """Add a backend; ``first`` puts it before the others in the order in which ``auto`` asks.

    Raises:
        ValueError: when the name is taken, or ``"auto"``.
    """
    if backend.name == "auto" or backend.name in _registry:
        raise ValueError(f"backend name {backend.name!r} is taken")
    others = dict(_registry)
    _registry[backend.name] = backend
    if first:
        for name, other in others.items():
            del _registry[name]
            _registry[name] = other


def available_backends() -> dict[str, list[str]]:
    """Every registered backend, in ``auto``'s order, with the reasons why it cannot run here (none: it can)."""
    return {name: backend.why_unavailable() for name, backend in _registry.items()}


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in _registry:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_registry)}, got {name!r}")
    return _registry[name]


def choose_backend(call: Call, name: str | None = None) -> Backend:
    """The backend for a call: the one named (by the argument or the settings), or the first that can serve it.

    Raises:
        RuntimeError: when none can, with every reason.
    """
    name = current_settings().backend if name is None else name
    candidates = list(_registry.values()) if name == "auto" else [get_backend(name)]
    reasons: list[str] = []
    for backend in candidates:
        missing = backend.why_unavailable() or backend.why_not(call)
        if not missing:
            log.debug("backend %s serves %s", backend.name, call)
            return backend
        reasons += [f"{backend.name}: {reason}" for reason in missing]
    raise RuntimeError(f"no backend can serve {call}: " + "; ".join(reasons))


def _torch_why_not(call: Call) -> list[str]:
    supported = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return [] if call.dtype in supported else [f"dtype {call.dtype} is not one of {supported}"]


def _cpu_why_not(call: Call) -> list[str]:
    return _torch_why_not(call) + ([] if call.device.type == "cpu" else [f"device {call.device} is not a CPU"])


def _cuda_why_not(call: Call) -> list[str]:
    return _torch_why_not(call) + ([] if call.device.type == "cuda" else [f"device {call.device} is not a CUDA device"])


register_backend(
    Backend(
        name="cpu",
        why_not=_cpu_why_not,
        why_unavailable=why_no_cpu_extension,
        score=cpu_backend.score,
        tile_gradients=cpu_backend.tile_gradients,
        recompute_gradients=cpu_backend.recompute_gradients,
    )
)
# The blockwise algorithm of torch, its element-wise passes by csrc/cuda.
register_backend(
    Backend(
        name="cuda",
        why_not=_cuda_why_not,
        why_unavailable=why_no_cuda_extension,
        score=functools.partial(torch_backend.score, passes=NATIVE_PASSES),
        tile_gradients=torch_backend.tile_gradients,
        recompute_gradients=functools.partial(torch_backend.recompute_gradients, passes=NATIVE_PASSES),
    )
)
register_backend(
    Backend(
        name="torch",
        why_not=_torch_why_not,
        why_unavailable=list,
        score=torch_backend.score,
        tile_gradients=torch_backend.tile_gradients,
        recompute_gradients=torch_backend.recompute_gradients,
    )
)
