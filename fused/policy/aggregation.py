"""How the losses of tokens become one number: the weight of each token, and the share of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_data, check_number
from ..scored_tokens import ScoredTokens

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
    num_items: Tensor | float | None = None

    def token_weights(self, tokens: ScoredTokens, dtype: torch.dtype) -> Tensor:
        """What the loss of each token is multiplied by. (N,)."""
        each = torch.ones(len(tokens), dtype=dtype, device=tokens.device)
        if self.name == "sequence-mean":
            lengths = torch.tensor(tokens.sequence_sizes, dtype=dtype, device=tokens.device)
            each = each / lengths.clamp(min=1)[tokens.sequences]
        elif self.name == "fixed-length":
            assert self.max_length is not None
            each = each / self.max_length
        items = self._items(tokens) if self.num_items is None else self.num_items
        return each / (items.to(each) if isinstance(items, Tensor) else max(1, items))

    def share(self, tokens: ScoredTokens, dtype: torch.dtype) -> float | Tensor:
        """The part of all tokens or sequences that this call has."""
        if self.num_items is None:
            return 1.0
        items = self.num_items.to(tokens.device, dtype) if isinstance(self.num_items, Tensor) else self.num_items
        return self._items(tokens) / items

    def _items(self, tokens: ScoredTokens) -> int:
        return len(tokens) if self.name == "token-mean" else len(tokens.sequence_sizes)


def check_num_items(num_items: Any, any_scored: bool) -> Tensor | float | None:
    """``num_items_in_batch``: finite and positive, or 0 if the call has no scored token. Returned as at least 1.

    The value of a CUDA tensor is checked by a device assertion.
    """
    name = "num_items_in_batch"
    if not isinstance(num_items, Tensor):
        return None if num_items is None else max(1.0, check_number(name, num_items, 0, open_low=any_scored))
    number = as_number(name, num_items)
    if number.device.type == "cpu":
        check_number(name, number.item(), 0, open_low=any_scored)
    elif number.is_cuda:
        valid = number > 0 if any_scored else number >= 0
        torch._assert_async(valid & number.isfinite(), f"{name} must be a finite number above 0")
    return number.clamp(min=1)


def as_number(name: str, value: Tensor) -> Tensor:
    """A tensor with one number, 0-dim and detached."""
    check_data(name, value)
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{name} must be one number, got {value.dtype} of shape {tuple(value.shape)}")
    return value.detach().reshape(())
