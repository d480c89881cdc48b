"""The losses in plain torch: the float64 reference, and what runs behind libraries that have no fused loss.

They share no code with ``logitless.fused``, because the check of a benchmarked result must not share its formulas.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .inputs import LossInputs
from .policy import POLICY_LOSSES, dapo_entropy
from .preference import PREFERENCE_LOSSES, upstream

#: Log-probs, the other inputs, and entropies (``None`` unless :func:`uses_entropy`) to a 0-dim loss.
Loss = Callable[[Tensor, LossInputs, "Tensor | None"], Tensor]

__all__ = ["POLICY_LOSSES", "PREFERENCE_LOSSES", "Loss", "LossInputs", "loss_of", "uses_entropy"]


def uses_entropy(task: str) -> bool:
    """Whether the loss of a task depends on the entropies."""
    return task == "dapo-entropy"


def loss_of(task: str) -> Loss:
    """The loss of a case's task; for ``logps`` and ``tile`` one with a given gradient at the log-probs."""
    if uses_entropy(task):
        return dapo_entropy
    function = {"logps": upstream, "tile": upstream, **PREFERENCE_LOSSES, **POLICY_LOSSES}[task]
    return lambda logps, inputs, entropies: function(logps, inputs)
