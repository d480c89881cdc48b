"""Providers of the ``tile`` suite: the element-wise pass over logits that are there, and the copy that bounds it."""

from __future__ import annotations

import torch

import logitless as ll
from logitless.kernels.backends.interface import Call, ElementWise
from logitless.kernels.backends.native.passes import NATIVE_PASSES
from logitless.kernels.backends.registry import get_backend
from logitless.kernels.backends.torch.passes import TORCH_PASSES, Logits
from logitless.kernels.core.blocking import core_options
from logitless.kernels.tile.sums import combine
from logitless.kernels.tile.targets import target_logit_and_slope

from .cases import Case, Inputs
from .registry import Result, Work, provider

#: The passes of each backend; those with GEMMs in their kernels have none to time alone.
_PASSES: dict[str, ElementWise] = {"cpu": NATIVE_PASSES, "cuda": NATIVE_PASSES, "torch": TORCH_PASSES}


def _tile(inputs: Inputs) -> torch.Tensor:
    """Raw logits (N, V) of the scored tokens."""
    return torch.mm(inputs.hidden.detach()[inputs.scored], inputs.weight.detach().t())


@provider("copy", tasks={"tile"}, roofline=True)
def copy(case: Case, inputs: Inputs) -> Work:
    """A copy of the tile: one read and one write of each logit, which no pass can do without."""
    source = _tile(inputs)
    destination = torch.empty_like(source)

    def step() -> Result:
        destination.copy_(source)
        return Result()

    return Work(step)


def _pass(name: str, passes: ElementWise, case: Case, inputs: Inputs) -> Work:
    """From the tile to log-probs and, in its place, the gradient."""
    source, labels = _tile(inputs), inputs.labels[inputs.scored]
    tile = source.clone()
    x, weight, head = inputs.hidden.detach()[inputs.scored], inputs.weight.detach(), case.shape.head
    options = core_options(512 << 20, frozenset(), "auto", 4, source.device)
    logits = Logits(x, weight, None, options.precision)
    raw = passes.target_logits(x, weight, None, labels, options.precision)

    def step() -> Result:
        zy, k, slope = target_logit_and_slope(raw.clone(), head)  # it works in place
        with ll.settings(backend=name):
            part = passes.scan_block(logits, head, options, tile, tile, zy, k, labels, 0, len(weight))
        stats, _ = combine([part], zy, k, slope, len(weight))
        logps = torch.zeros(inputs.labels.shape, dtype=stats.logps.dtype, device=source.device)
        return Result(token_logps=logps.masked_scatter(inputs.scored, stats.logps))

    return Work(step, prepare=lambda: tile.copy_(source))


def _register(name: str, passes: ElementWise) -> None:
    def why_not(case: Case, device: torch.device) -> list[str]:
        backend, dtype = get_backend(name), case.shape.torch_dtype
        return [*backend.why_unavailable(), *backend.why_not(Call(device, dtype, dtype))]

    provider(f"pass@{name}", tasks={"tile"}, why_not=why_not)(lambda case, inputs: _pass(name, passes, case, inputs))


for _name, _of_backend in _PASSES.items():
    _register(_name, _of_backend)
