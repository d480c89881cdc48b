"""What the losses read besides log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: The value of an input that a loss does not read.
UNUSED = torch.empty(0)


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss besides log-probs. S sequences of T tokens; policy losses also take P packed tokens.

    Attributes:
        scored: bool, shaped like the log-probs: (S, T) or (P,).
        ref_logps: (S,) log-probabilities of the reference. desirable: (S,) bool and kl: 0-dim, both for KTO.
        upstream: the gradient of the log-probs.
        old_logps, advantages: broadcast to the log-probs.
    """

    scored: Tensor
    ref_logps: Tensor = UNUSED
    desirable: Tensor = UNUSED
    kl: Tensor = UNUSED
    upstream: Tensor = UNUSED
    old_logps: Tensor = UNUSED
    advantages: Tensor = UNUSED
