"""The transforms of a head whose temperature differs from token to token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .head_spec import HeadSpec


@dataclass(frozen=True, eq=False)
class RowHead(HeadSpec):
    """A :class:`HeadSpec` with one temperature per token, for N tokens: ``z = T(r) / tau``, computed as a factor of each row.

    Backends take it wherever they take a HeadSpec. Whatever slices hidden states by tokens slices it with :func:`head_rows`.

    Args:
        inverse_temperature: (N,) ``1 / tau``, float32 (float64 for float64 hidden states). ``temperature`` is 1.
    """

    inverse_temperature: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """``inverse_temperature`` (N,)."""
        assert self.inverse_temperature is not None
        return self.inverse_temperature

    @property
    def slope(self) -> Tensor:  # type: ignore[override]
        """``dz/dr`` at uncapped logits, (N,)."""
        return self.rows * self.logit_scale

    def transform_(self, r: Tensor) -> Tensor | None:
        """As :meth:`HeadSpec.transform_`; r (N,) or (N, W)."""
        rows = self.rows.view(-1, *[1] * (r.dim() - 1))
        if self.softcap is None:
            r.mul_(rows * self.logit_scale)
            return None
        r.mul_(self.logit_scale / self.softcap).tanh_()
        squared = r * r
        r.mul_(rows * self.softcap)
        return squared


def with_temperatures(
    head: HeadSpec,
    temperature: Tensor,  # (N,) > 0
    dtype: torch.dtype,  # of the sums
) -> RowHead:
    """The transforms of N tokens at their own temperatures, in place of the head's."""
    return RowHead(head.logit_scale, head.softcap, 1.0, head.vocab_size, temperature.detach().to(dtype).reciprocal())


def head_rows(head: HeadSpec, rows: slice) -> HeadSpec:
    """The transforms of some of the tokens."""
    return replace(head, inverse_temperature=head.rows[rows].contiguous()) if isinstance(head, RowHead) else head


def inverse_temperature(head: HeadSpec) -> Tensor | None:
    """What kernels multiply the logits of each token by, (N,); ``None`` where all tokens have the head's temperature."""
    return head.rows if isinstance(head, RowHead) else None


def tanh_factor(head: HeadSpec, like: Tensor) -> Tensor:
    """What turns capped logits back into ``tanh``: ``temperature / softcap`` of each token. (N,), as ``like``."""
    assert head.softcap is not None
    if isinstance(head, RowHead):
        return (head.rows * head.softcap).reciprocal().to(like.dtype)
    return torch.full_like(like, head.temperature / head.softcap)
