"""The registry of backends. Each says which calls it cannot serve, and why.

``auto`` takes the first that can; on a GPU, of those that can, the one that should be fastest.
"""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.settings import current_settings
from ..operators.native import why_no_cpu_extension, why_no_cuda_extension
from ..planner.cost import Cost, predict
from .native import cpu as cpu_backend
from .native.passes import NATIVE_PASSES
from .torch import blockwise as torch_backend
from .triton.compat import interpreted as triton_is_interpreted
from .triton.compat import why_no_triton

log = logging.getLogger("logitless")


#: What a backend is asked to do: ``score`` alone; ``score`` with a tile, then ``tile_gradients``; ``score`` with
#: ``unit_dhidden``; ``recompute_gradients``, whose ``score`` is a call of its own.
Work = Literal["forward", "tile", "frozen", "recompute"]


@dataclass(frozen=True)
class Call:
    """What a backend is asked to serve. The sizes serve predictions alone: without them there are none.

    Attributes:
        device, dtype, weight_dtype: of the hidden states (as computed in) and the weight.
        num_tokens, hidden_size, vocab_size: N, H, V.
        work: see :data:`Work`.
        tiles: into which the tokens of ``"tile"`` are divided.
        accumulate: whether dW is collected in float32.
        train_hidden, train_weight: which gradients are wanted, where ``work`` makes any.
        workspace: bytes for blocks of logits.
        architecture: of a GPU that may not be here, to plan for; ``None``: the device's.
        grad_filter: the size below which blocks of the gradient are left out, see ``settings``.
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    num_tokens: int = 0
    hidden_size: int = 0
    vocab_size: int = 0
    work: Work = "tile"
    tiles: int = 1
    accumulate: bool = False
    train_hidden: bool = True
    train_weight: bool = True
    workspace: int = 32 << 20
    architecture: str | None = None
    grad_filter: float = 0.0


@dataclass(frozen=True)
class Backend:
    """One implementation of the core; see ``kernels/backends/torch/blockwise.py`` for the meaning of the three functions.

    Attributes:
        name: what ``settings(backend=...)`` calls it.
        why_not: every reason why it cannot serve a call; empty when it can.
        why_unavailable: every reason why it cannot run on this machine at all.
        predict: what a call on a GPU should cost; ``None``: nobody knows.
    """

    name: str
    why_not: Callable[[Call], list[str]]
    why_unavailable: Callable[[], list[str]]
    score: Callable[..., Any]
    tile_gradients: Callable[..., None]
    recompute_gradients: Callable[..., None]
    predict: Callable[[Call], Cost] | None = None


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


def _predicted(backend: Backend, calls: Sequence[Call]) -> Cost | None:
    """Of all calls together; only GPUs have constants to predict with."""
    if backend.predict is None or any(
        c.device.type != "cuda" or min(c.num_tokens, c.hidden_size, c.vocab_size) < 1 for c in calls
    ):
        return None
    return functools.reduce(operator.add, map(backend.predict, calls))


def rank_backends(calls: Sequence[Call], name: str | None = None) -> list[tuple[Backend, Cost | None]]:
    """The backends that can serve all of the calls, best first, each with what the calls should cost on it.

    On a GPU the least predicted time comes first, and what has no prediction after it in the registry's order. On other
    devices the first that can serve is the only one. A call with an ``architecture`` is a plan for another machine: which
    backends this one has does not matter.

    Args:
        calls: what one and the same backend is to do; one device.
        name: of a backend, or ``"auto"``; default from the settings.

    Raises:
        RuntimeError: when none can, with every reason.
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
    return sorted(found, key=lambda one: math.inf if one[1] is None else one[1].seconds)


def choose_backend(call: Call, name: str | None = None) -> Backend:
    """The backend for a call: the one named (by the argument or the settings), or the best of :func:`rank_backends`.

    Raises:
        RuntimeError: when none can serve it, with every reason.
    """
    backend = rank_backends([call], name)[0][0]
    log.debug("backend %s serves %s", backend.name, call)
    return backend


def _unsupported(call: Call, *devices: str) -> list[str]:
    """The reasons that all backends have; ``devices``: the types that one serves, none for any."""
    supported = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    reasons = [] if call.dtype in supported else [f"dtype {call.dtype} is not one of {supported}"]
    if devices and call.device.type not in devices:
        reasons.append(f"device {call.device} is not one of type {' or '.join(devices)}")
    return reasons


def _unfiltered(call: Call, *devices: str) -> list[str]:
    filters = [f"grad_filter={call.grad_filter} needs the triton backend"] if call.grad_filter else []
    return _unsupported(call, *devices) + filters


def _triton_why_not(call: Call) -> list[str]:
    # a plan for a GPU that is not here asks for no device, and interprets nothing
    interpreted = call.architecture is None and not why_no_triton() and triton_is_interpreted()
    reasons = _unsupported(call, "cuda", "xpu", *(["cpu"] if interpreted else []))
    if interpreted and torch.bfloat16 in (call.dtype, call.weight_dtype):
        reasons.append("Triton's interpreter computes nothing in bfloat16")
    if call.grad_filter and call.dtype == torch.float64:
        reasons.append(f"grad_filter={call.grad_filter} does not work in float64")
    return reasons


def _triton_function(name: str) -> Callable[..., Any]:
    """A function of ``triton_backend``, imported with Triton when it is first called."""

    def function(*args: Any, **kwargs: Any) -> Any:
        from .triton import backend as triton_backend

        return getattr(triton_backend, name)(*args, **kwargs)

    return function


register_backend(
    Backend(
        name="cpu",
        why_not=lambda call: _unfiltered(call, "cpu"),
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
        why_not=lambda call: _unfiltered(call, "cuda"),
        why_unavailable=why_no_cuda_extension,
        score=functools.partial(torch_backend.score, passes=NATIVE_PASSES),
        tile_gradients=torch_backend.tile_gradients,
        recompute_gradients=functools.partial(torch_backend.recompute_gradients, passes=NATIVE_PASSES),
        predict=functools.partial(predict, "cuda"),
    )
)
register_backend(
    Backend(
        name="torch",
        why_not=_unfiltered,
        why_unavailable=list,
        score=torch_backend.score,
        tile_gradients=torch_backend.tile_gradients,
        recompute_gradients=torch_backend.recompute_gradients,
        predict=functools.partial(predict, "torch"),
    )
)
# After torch, which serves any call on a CPU: the interpreter is taken by name alone. On GPUs the order does not matter.
register_backend(
    Backend(
        name="triton",
        why_not=_triton_why_not,
        why_unavailable=why_no_triton,
        score=_triton_function("score"),
        tile_gradients=_triton_function("tile_gradients"),
        recompute_gradients=_triton_function("recompute_gradients"),
        predict=functools.partial(predict, "triton"),
    )
)
