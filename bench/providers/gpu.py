"""Providers for GPUs only: Cut Cross-Entropy and QuACK."""

from __future__ import annotations

from torch import Tensor

from ..core.cases import IGNORE, Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses import loss_of
from .common import TOKEN_TASKS, all_of, finish, needs, needs_gpu, no_softcap


@provider("cce", tasks=TOKEN_TASKS, why_not=all_of(needs_gpu, needs("cut_cross_entropy")))
def cut_cross_entropy(case: Case, inputs: Inputs) -> Work:
    """The per-token form of Cut Cross-Entropy, which takes any loss behind it."""
    from cut_cross_entropy import linear_cross_entropy

    loss_fn = loss_of(case.task)

    def step() -> Result:
        options = {"softcap": case.shape.head.softcap, "reduction": "none", "ignore_index": IGNORE}
        logps: Tensor = -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, **options).float()
        return finish(loss_fn(logps, inputs, None), inputs, token_logps=logps)

    return Work(step)


@provider("quack", tasks={"nll"}, why_not=all_of(needs_gpu, needs("quack"), no_softcap))
def quack(case: Case, inputs: Inputs) -> Work:
    """QuACK's chunked linear cross-entropy, a mean over tokens."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    mask = inputs.scored

    def step() -> Result:
        loss = chunked_linear_cross_entropy(inputs.hidden[mask], inputs.weight, inputs.labels[mask], reduction="mean")
        return finish(loss, inputs)

    return Work(step)
