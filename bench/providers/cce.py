"""The provider from Cut Cross-Entropy."""

from __future__ import annotations

from torch import Tensor

from ..core.cases import IGNORE, Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses import loss_of
from .common import TOKEN_TASKS, all_of, finish, needs, needs_gpu


@provider("cce", tasks=TOKEN_TASKS, why_not=all_of(needs_gpu, needs("cut_cross_entropy")))
def cut_cross_entropy(case: Case, inputs: Inputs) -> Work:
    """Its per-token form takes any loss behind it."""
    from cut_cross_entropy import linear_cross_entropy

    loss_fn = loss_of(case.task)

    def step() -> Result:
        options = {"softcap": case.shape.head.softcap, "reduction": "none", "ignore_index": IGNORE}
        logps: Tensor = -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, **options).float()
        return finish(loss_fn(logps, inputs.loss_inputs, None), inputs, token_logps=logps)

    return Work(step)
