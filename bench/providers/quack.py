"""The provider from QuACK."""

from __future__ import annotations

from ..core.cases import Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from .common import all_of, finish, needs, needs_gpu, no_softcap


@provider("quack", tasks={"nll"}, why_not=all_of(needs_gpu, needs("quack"), no_softcap))
def quack(case: Case, inputs: Inputs) -> Work:
    """Its chunked linear cross-entropy, a mean over tokens."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    mask = inputs.scored

    def step() -> Result:
        loss = chunked_linear_cross_entropy(inputs.hidden[mask], inputs.weight, inputs.labels[mask], reduction="mean")
        return finish(loss, inputs)

    return Work(step)
