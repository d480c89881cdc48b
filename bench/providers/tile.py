"""Providers of the suite ``tile``: the element-wise pass over given logits, and the copy that bounds it."""

from __future__ import annotations

import torch

import logitless as ll
from logitless.kernels.backends.native.passes import NATIVE_PASSES
from logitless.kernels.backends.torch.passes import TORCH_PASSES, Logits, Passes, combine, target_logit_and_slope
from logitless.kernels.planner.plan import core_options

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from .common import needs_backend

#: The passes of each backend; backends with GEMMs in their kernels have none to time alone.
_PASSES: dict[str, Passes] = {"cpu": NATIVE_PASSES, "cuda": NATIVE_PASSES, "torch": TORCH_PASSES}


def _tile(inputs: Inputs) -> torch.Tensor:
    """Raw logits (N, V) of the scored tokens."""
    return torch.mm(inputs.hidden.detach()[inputs.scored], inputs.weight.detach().t())


@provider("copy", tasks={"tile"}, roofline=True)
def copy(case: Case, inputs: Inputs) -> Work:
    """A copy of the tile: one read and one write of each logit, the fewest of any pass."""
    source = _tile(inputs)
    destination = torch.empty_like(source)

    def step() -> Result:
        destination.copy_(source)
        return Result()

    return Work(step)


def _pass(name: str, case: Case, inputs: Inputs) -> Work:
    """From the tile to log-probs and, in its place, the gradient."""
    passes, source, labels = _PASSES[name], _tile(inputs), inputs.labels[inputs.scored]
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


for _name in _PASSES:
    _register = provider(f"pass@{_name}", tasks={"tile"}, why_not=needs_backend(_name))
    _register(lambda case, inputs, name=_name: _pass(name, case, inputs))
