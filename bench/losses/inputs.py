"""What the losses read besides log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: The value of an input that a task does not have.
UNUSED = torch.empty(0)


@dataclass
class LossInputs:
    """Inputs of a loss besides log-probs. S sequences of T tokens, or P packed tokens for policy losses.

    Attributes:
        scored: bool, shaped like the log-probs: (S, T) or (P,).
        ref_logps: (S,) log-probabilities of the reference. desirable: (S,) bool and kl: 0-dim, both for KTO.
        upstream: float32, the gradient of the log-probs in ``logps``.
        old_logps, advantages: float32, broadcast to the log-probs.
    """

    scored: Tensor
    ref_logps: Tensor = UNUSED
    desirable: Tensor = UNUSED
    kl: Tensor = UNUSED
    upstream: Tensor = UNUSED
    old_logps: Tensor = UNUSED
    advantages: Tensor = UNUSED
