"""How the losses of tokens become one number: the weight of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..num_items import OF_CALL, NumItems, over
from ..scored_tokens import ScoredTokens
from ..sequence_group import WholeSequences

#: See :class:`logitless.FusedLinearPolicyLoss`.
AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-mean-token-sum", "fixed-length")


@dataclass(frozen=True)
class Aggregation:
    """The sum over tokens that is the loss.

    Attributes:
        name: one of :data:`AGGREGATIONS`.
        max_length: the fixed length.
        num_items: what the sum is divided by, in place of the scored tokens (``"token-mean"``) or sequences of this call.
    """

    name: str
    max_length: int | None = None
    num_items: NumItems = OF_CALL

    def token_weights(self, tokens: ScoredTokens, dtype: torch.dtype, whole: WholeSequences | None) -> Tensor:
        """What the loss of each token is multiplied by, (N,). ``whole``: of sequences that other ranks share."""
        each = torch.ones(len(tokens), dtype=dtype, device=tokens.device)
        if self.name == "sequence-mean":
            if whole is None:
                lengths = torch.tensor(tokens.sequence_sizes, dtype=dtype, device=tokens.device)
            else:
                lengths = whole.lengths
            each = each / lengths.clamp(min=1)[tokens.sequences]
        elif self.name == "fixed-length":
            assert self.max_length is not None
            each = each / self.max_length
        if self.name == "token-mean":
            return over(each, self.num_tokens(tokens, whole))
        return over(each, len(tokens.sequence_sizes) if self.num_items.units is None else self.num_items.units)

    def num_tokens(self, tokens: ScoredTokens, whole: WholeSequences | None) -> Tensor | float:
        """What a mean over tokens divides by."""
        if self.num_items.tokens is not None:
            return self.num_items.tokens
        return len(tokens) if whole is None else whole.lengths.sum()
