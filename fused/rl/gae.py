"""Generalized advantage estimation over packed or padded segments, and how a batch of segments is laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from logitless.kernels.backends.registry import choose_elementwise
from logitless.kernels.core.checks import check_tensor, checked_offsets


class GAE(NamedTuple):
    """What :func:`gae` returns; both are shaped like the rewards, without a gradient, 0 at masked positions.

    Attributes:
        advantages: generalized advantage estimates.
        returns: ``advantages + values``, the targets of the value function (lambda-returns).
    """

    advantages: Tensor
    returns: Tensor


def check_float(name: str, value: object) -> None:
    """A floating point tensor, or an error that names it."""
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def check_like(name: str, value: object, like: Tensor, like_name: str, *, boolean: bool = False) -> None:
    """A floating point (or bool) tensor of the shape and on the device of another one, or an error that names it."""
    if boolean:
        check_tensor(name, value)
        assert isinstance(value, Tensor)
        if value.dtype != torch.bool:
            raise TypeError(f"{name} must be bool, got {value.dtype}: pass {name}.bool()")
    else:
        check_float(name, value)
    assert isinstance(value, Tensor)
    if value.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)} like {like_name}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}: move one of them")


def check_one_each(name: str, value: object, count: int, device: torch.device) -> None:
    """A floating point tensor with one value a segment, or an error that names it."""
    check_float(name, value)
    assert isinstance(value, Tensor)
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape [{count}], one value a segment, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the tokens are on {device}: move one of them")


def check_rate(name: str, value: object) -> float:
    """A number from 0 to 1, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Segments:
    """Where the segments of a batch are, and which tokens count.

    A token that is masked does not exist for what is computed on packed tokens: the next one that counts follows.
    """

    shape: torch.Size
    bounds: Tensor  # (S + 1,) int64, of all tokens
    mask: Tensor | None  # (N,) bool, the tokens that count

    @classmethod
    def of(cls, name: str, tokens: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Segments:
        """Check ``cu_seqlens`` and ``mask`` against ``tokens``, (N,) with ``cu_seqlens`` or else (S, T)."""
        if mask is not None:
            check_like("mask", mask, tokens, name, boolean=True)
        if cu_seqlens is None:
            if tokens.dim() != 2:
                raise ValueError(f"{name} must have shape [S, T], or [N] with cu_seqlens, got {tuple(tokens.shape)}")
            count, length = tokens.shape
            bounds = torch.arange(count + 1, device=tokens.device) * length
        else:
            if tokens.dim() != 1:
                raise ValueError(f"{name} must have shape [N] with cu_seqlens, got {tuple(tokens.shape)}")
            bounds = checked_offsets(cu_seqlens, len(tokens), tokens.device)
        return cls(tokens.shape, bounds, None if mask is None else mask.reshape(-1))

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def kept(self) -> Tensor | None:
        """The places of the tokens that count, (N',), or None for all."""
        return None if self.mask is None else self.mask.nonzero()[:, 0]

    @cached_property
    def offsets(self) -> Tensor:
        """The bounds among tokens that count, (S + 1,)."""
        if self.mask is None:
            return self.bounds
        before = torch.zeros(len(self.mask) + 1, dtype=torch.long, device=self.mask.device)
        torch.cumsum(self.mask, 0, out=before[1:])
        return before[self.bounds]

    @cached_property
    def last(self) -> tuple[Tensor, Tensor]:
        """Which segments have tokens, (S,) bool, and the place of the last one of each of these among those that count."""
        filled = self.offsets[1:] > self.offsets[:-1]
        return filled, self.offsets[1:][filled] - 1

    def only(self, wanted: Tensor) -> Segments:
        """The same, with the tokens of segments that are not ``wanted``, (S,) bool, masked."""
        mask = torch.repeat_interleave(wanted, self.bounds.diff(), output_size=math.prod(self.shape))
        return Segments(self.shape, self.bounds, mask if self.mask is None else mask & self.mask)

    def pack(self, tokens: Tensor) -> Tensor:
        """The tokens that count, (N',)."""
        flat = tokens.reshape(-1)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of :meth:`pack`; 0 at masked positions."""
        if self.kept is None:
            return packed.view(self.shape)
        out = packed.new_zeros(math.prod(self.shape))
        return out.index_copy_(0, self.kept, packed).view(self.shape)


@torch.no_grad()
def gae(
    rewards: Tensor,  # (N,) with cu_seqlens, or (S, T)
    values: Tensor,  # like rewards
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    mask: Tensor | None = None,  # like rewards, bool
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,  # (S,)
) -> GAE:
    """Generalized advantage estimation, https://huggingface.co/papers/1506.02438 eq. 16, segment by segment:

        delta_t = rewards_t + gamma * values_{t+1} - values_t
        advantages_t = delta_t + gamma * lam * advantages_{t+1}

    A masked token does not exist: its neighbours follow each other, and whatever stands there changes nothing. After the last
    token of a segment, the value is that of ``last_values`` and the advantage 0.

    Args:
        rewards: reward of each token, floating point; padded ``[S, T]``, or packed ``[N]`` with ``cu_seqlens``.
        values: the value function's estimate before each token, floating point.
        cu_seqlens: int32 or int64, where each packed segment starts and ends. Segments may be empty.
        mask: the tokens that count. Holes are allowed.
        gamma: discount, in [0, 1].
        lam: weight of longer horizons, in [0, 1]: 0 for one-step temporal differences, 1 for Monte Carlo returns.
        last_values: value after the end of a segment that was cut off. Default: 0, the segment has ended.

    Returns:
        GAE: advantages and returns in the rewards' dtype, at least float32; computed in float64.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> rewards, values = torch.tensor([0.0, 0.0, 1.0, 5.0]), torch.tensor([0.5, 0.5, 0.5, 1.0])
        >>> gae(rewards, values, cu_seqlens=torch.tensor([0, 3, 4]), lam=1.0).advantages
        tensor([0.5000, 0.5000, 0.5000, 4.0000])
    """
    check_float("rewards", rewards)
    check_like("values", values, rewards, "rewards")
    gamma, decay = check_rate("gamma", gamma), check_rate("gamma", gamma) * check_rate("lam", lam)
    segments = Segments.of("rewards", rewards, cu_seqlens, mask)
    if last_values is not None:
        check_one_each("last_values", last_values, segments.count, rewards.device)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    flat = None if last_values is None else last_values.contiguous()
    scan = choose_elementwise(rewards.device, "gae").gae
    pair = scan(rewards.reshape(-1), values.reshape(-1), segments.bounds, segments.mask, gamma, decay, flat, dtype)
    return GAE(*(t.view(rewards.shape) for t in pair))
