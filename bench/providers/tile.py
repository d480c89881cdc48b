"""Providers of the suite ``tile``: the element-wise pass over given logits, and the copy that bounds it."""

from __future__ import annotations

import torch

from logitless.kernels.backends.registry import get_backend
from logitless.kernels.backends.torch.passes import Logits
from logitless.kernels.core.blocking import core_options
from logitless.kernels.tile.sums import combine
from logitless.kernels.tile.targets import target_logit_and_slope

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from .common import copies, needs_backend

#: Backends whose passes over a tile are separate; the others have them in the kernels of their GEMMs.
_BACKENDS = ("cpu", "cuda", "torch")


def _tile(inputs: Inputs) -> torch.Tensor:
    """Raw logits (N, V) of the scored tokens."""
    return torch.mm(inputs.hidden.detach()[inputs.scored], inputs.weight.detach().t())


@provider("copy", tasks={"tile"}, roofline=True)
def copy(case: Case, inputs: Inputs) -> Work:
    """A copy of the tile: the fewest reads and writes of any pass."""
    return copies(_tile(inputs))


def _pass(name: str, case: Case, inputs: Inputs) -> Work:
    """From the tile to log-probs and, in its place, the gradient."""
    passes, source, labels = get_backend(name).elementwise, _tile(inputs), inputs.labels[inputs.scored]
    tile = source.clone()
    x, weight, head = inputs.hidden.detach()[inputs.scored], inputs.weight.detach(), case.shape.head
    options = core_options(512 << 20, frozenset(), "auto", 4, source.device)
    logits = Logits(x, weight, None, options.precision)
    raw = passes.target_logits(x, weight, None, labels, options.precision)

    def step() -> Result:
        zy, k, slope = target_logit_and_slope(raw.clone(), head)  # it works in place
        part = passes.scan_block(logits, head, options, tile, tile, zy, k, labels, 0, len(weight))
        stats, _ = combine([part], zy, k, slope, len(weight))
        logps = torch.zeros(inputs.labels.shape, dtype=stats.logps.dtype, device=source.device)
        return Result(token_logps=logps.masked_scatter(inputs.scored, stats.logps))

    return Work(step, prepare=lambda: tile.copy_(source))


def _register(name: str) -> None:
    build = provider(f"pass@{name}", tasks={"tile"}, why_not=needs_backend(name))
    build(lambda case, inputs: _pass(name, case, inputs))


for _name in _BACKENDS:
    _register(_name)
