"""The registry of backends, and the one place that chooses among them.

``auto`` takes the first that can serve a call; on a GPU, of those that can, the one with the least predicted time.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Sequence

import torch

from ..core.blocking import INVARIANT_TOKENS
from ..core.settings import backend_names, current_settings
from ..cost_model.costs import Cost
from .interface import Backend, Call, ElementWise

log = logging.getLogger("logitless")

_registry: dict[str, Backend] = {}
#: What the choice for a batch-invariant call depends on.
_SHAPE_ALONE = ("device", "dtype", "weight_dtype", "hidden_size", "vocab_size", "outputs", "architecture")


def register_backend(backend: Backend, *, first: bool = False) -> None:
    """Add a backend; ``first`` puts it before the others in the order in which ``auto`` asks.

    Raises:
        ValueError: if the name is taken, or ``"auto"``.

    Example:
        >>> from dataclasses import replace
        >>> from logitless.kernels.backends.registry import get_backend
        >>> register_backend(replace(get_backend("torch"), name="mine"))
        >>> available_backends()["mine"]
        []
    """
    if backend.name == "auto" or backend.name in _registry:
        raise ValueError(f"backend name {backend.name!r} is taken")
    others = dict(_registry)
    _registry[backend.name] = backend
    backend_names.add(backend.name)
    if first:
        for name, other in others.items():
            del _registry[name]
            _registry[name] = other


def available_backends() -> dict[str, list[str]]:
    """Every registered backend, in ``auto``'s order, with the reasons why it cannot run here (empty if it can).

    Example:
        >>> available_backends()["torch"]
        []
    """
    return {name: backend.why_unavailable() for name, backend in _registry.items()}


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in _registry:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_registry)}, got {name!r}")
    return _registry[name]


def _predicted(backend: Backend, calls: Sequence[Call]) -> Cost | None:
    """The cost of all calls together. Only GPUs have constants to predict with."""
    if backend.predict is None or any(
        c.device.type != "cuda" or min(c.num_tokens, c.hidden_size, c.vocab_size) < 1 for c in calls
    ):
        return None
    return functools.reduce(operator.add, map(backend.predict, calls))


def _rank(backend: Backend, calls: Sequence[Call], cost: Cost | None) -> float:
    """Seconds by which backends are compared. ``cost``: of the calls.

    Batch-invariant calls are compared as one call of INVARIANT_TOKENS tokens, so that the choice depends on hidden size,
    vocabulary, dtypes, outputs and device alone.
    """
    if calls[0].batch_invariant:
        known = {name: getattr(calls[0], name) for name in _SHAPE_ALONE}
        cost = _predicted(backend, [Call(**known, num_tokens=INVARIANT_TOKENS)])
    return math.inf if cost is None else cost.seconds


def rank_backends(calls: Sequence[Call], name: str | None = None) -> list[tuple[Backend, Cost | None]]:
    """The backends that can serve all of the calls, best first, each with the predicted cost of the calls.

    On a GPU the least predicted time comes first; backends without a prediction follow in the registry's order. On other
    devices the first that can serve is the only one. A call with an ``architecture`` is a plan for another machine: which
    backends run on this one does not matter.

    Args:
        calls: what one backend is to do; all on one device.
        name: of a backend, or ``"auto"``; default from the settings.

    Raises:
        RuntimeError: if no backend can, with every reason.
    """
    name = current_settings().backend if name is None else name
    candidates = list(_registry.values()) if name == "auto" else [get_backend(name)]
    found: list[tuple[Backend, Cost | None]] = []
    reasons: list[str] = []
    for backend in candidates:
        missing = [] if calls[0].architecture is not None else backend.why_unavailable()
        missing = missing or list(dict.fromkeys(reason for call in calls for reason in backend.why_not(call)))
        reasons += [f"{backend.name}: {reason}" for reason in missing]
        if not missing:
            found.append((backend, _predicted(backend, calls)))
            if calls[0].device.type != "cuda":
                break
    if not found:
        raise RuntimeError(f"no backend can serve {calls}: " + "; ".join(reasons))
    return sorted(found, key=lambda one: _rank(one[0], calls, one[1]))


def choose_backend(call: Call, name: str | None = None) -> Backend:
    """The backend for a call: the one named (by the argument or the settings), or the best of :func:`rank_backends`.

    Raises:
        RuntimeError: if no backend can serve it, with every reason.
    """
    backend = rank_backends([call], name)[0][0]
    log.debug("backend %s serves %s", backend.name, call)
    return backend


def choose_elementwise(device: torch.device, function: str, name: str | None = None) -> ElementWise:
    """The element-wise functions for a public function that needs no GEMM, and so has no plan.

    Under ``auto``, those of the first backend that runs on the device; on GPUs, those of the first that has a ``function`` of
    its own, if any does.

    Args:
        device: of the tensors.
        function: the field of :class:`ElementWise` that is needed.
        name: of a backend, or ``"auto"``; default from the settings.

    Raises:
        RuntimeError: if the backend of that name does not run on the device, with every reason.
    """
    name = current_settings().backend if name is None else name
    call = Call(device, torch.float32, torch.float32)
    if name != "auto":
        return rank_backends([call], name)[0][0].elementwise
    usable = [b for b in _registry.values() if not b.why_unavailable() and not b.why_not(call)]
    if device.type != "cpu":  # where Triton's interpreter has functions of its own, and runs only by name
        shared = getattr(_registry["torch"].elementwise, function)
        usable = [b for b in usable if getattr(b.elementwise, function) is not shared] or usable
    return usable[0].elementwise
