"""The layouts that token ids come in: padded, packed, or a list; and values of tokens taken out of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from logitless.kernels.core.checks import check_cu_seqlens, check_tensor

#: Accepted forms of token ids: padded (S, T), packed (N,), or a list of 1-D tensors or of lists of ints.
TokenSequences: TypeAlias = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the caller's sequences were laid out, to flatten other values of their tokens in the same way."""

    kind: str  # "padded", "packed" or "list"
    shape: tuple[int, ...]  # of the caller's tensor; (N,) for a list
    bounds: list[int]  # S + 1 values
    device: torch.device
    real: Tensor | None = None  # padded only: (N,) index of each token in the flattened (S, T)

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of each sequence."""
        return [b - a for a, b in itertools.pairwise(self.bounds)]

    @property
    def token_dims(self) -> tuple[int, ...]:
        """Numbers of dimensions that the tokens of a tensor of values may have."""
        return (2,) if self.kind == "padded" else (1, 2)

    def follows(self, value: Any) -> bool:
        """Whether values are laid out like the sequences: (S, T, ...), (N,), (1, N, ...), or a list of the same lengths."""
        if self.kind == "list":
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, (Tensor, list, tuple)) for v in value):
                return False
            return [len(v) if not isinstance(v, Tensor) or v.dim() else -1 for v in value] == self.sizes
        if not isinstance(value, Tensor):
            return False
        wanted = [self.shape] if self.kind == "padded" else [self.shape, (1, *self.shape)]
        return any(tuple(value.shape[: len(shape)]) == shape for shape in wanted)

    def select(self, name: str, value: Any) -> Tensor:
        """Values of the tokens, (N, ...) of any dtype, from values laid out like the sequences."""
        if not self.follows(value):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if self.kind == "list":
                wanted = f"be a list of the lengths of the sequences, {_shown(self.sizes)}"
            else:
                packed = " (N, the packed tokens)" if self.kind == "packed" else ""
                wanted = f"have shape {self.shape} like the sequences{packed}"
            raise ValueError(f"{name} must {wanted}, got {got}")
        if self.kind == "list":
            parts = [torch.as_tensor(v, device=self.device) for v in value if len(v)]
            return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=self.device)
        if self.kind == "packed":
            return (value[0] if tuple(value.shape[:2]) == (1, *self.shape) else value).to(self.device)
        assert self.real is not None
        return value.to(self.device).flatten(0, 1)[self.real]

    def flatten(self, name: str, value: Any) -> Tensor:
        """Values of the tokens, (N,) int64, from integers laid out like the sequences."""
        if self.kind == "list":
            flat, lengths = _concatenated(name, value)
            if lengths != self.sizes:
                raise ValueError(f"{name} must have the lengths of the sequences, {_shown(self.sizes)}, got {_shown(lengths)}")
            return flat.to(self.device)
        check_tensor(name, value)
        check_integers(name, value)
        if tuple(value.shape) != self.shape:
            raise ValueError(f"{name} must have shape {self.shape} like the sequences, got {tuple(value.shape)}")
        flat = value.reshape(-1).long().to(self.device)
        return flat if self.real is None else flat[self.real]

    def unflatten(self, values: Tensor) -> Tensor:
        """Values of the tokens (N,) in the caller's shape, with 0 at padding."""
        if self.real is None:
            return values
        size = self.shape[0] * self.shape[1]
        return values.new_zeros(size).index_copy(0, self.real.to(values.device), values).view(self.shape)


def _shown(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ...]"


def check_integers(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")


def _concatenated(name: str, sequences: Any) -> tuple[Tensor, list[int]]:
    """A list of 1-D tensors, or of lists of ints, end to end: (N,) int64, and the length of each."""
    if isinstance(sequences, (str, bytes)) or not isinstance(sequences, Sequence):
        raise TypeError(
            f"{name} must be a tensor, a list of 1-D tensors or a list of lists of ints, got {type(sequences).__name__}"
        )
    if any(isinstance(s, Tensor) for s in sequences):
        for i, s in enumerate(sequences):
            check_tensor(f"{name}[{i}]", s)
            check_integers(f"{name}[{i}]", s)
            if s.dim() != 1:
                raise ValueError(f"{name}[{i}] must be 1-D, got shape {tuple(s.shape)}")
            if s.device != sequences[0].device:
                raise ValueError(f"{name}[{i}] is on {s.device} but {name}[0] is on {sequences[0].device}: move one of them")
        return torch.cat([s.long() for s in sequences]), [len(s) for s in sequences]
    for i, s in enumerate(sequences):
        if isinstance(s, (str, bytes)) or not isinstance(s, Sequence):
            raise TypeError(f"{name}[{i}] must be a 1-D tensor or a list of ints, got {type(s).__name__}")
    values = list(itertools.chain.from_iterable(sequences))
    if others := set(map(type, values)) - {int}:
        raise TypeError(f"{name} must hold ints, got {', '.join(sorted(other.__name__ for other in others))}")
    return torch.tensor(values, dtype=torch.int64, device="cpu"), [len(s) for s in sequences]


def _of_padded(ids: Tensor, attention_mask: Tensor | None) -> Layout:
    """The layout of padded ids (S, T)."""
    if attention_mask is None:
        real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    else:
        check_tensor("attention_mask", attention_mask)
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")
        if attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask must have shape {tuple(ids.shape)}, got {tuple(attention_mask.shape)}")
        mask = attention_mask.to(ids.device)
        real = mask.bool()
        starts = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
        # one synchronisation for both checks
        holes, other = torch.stack(((starts.sum(1) > 1).any(), (mask != real.to(mask.dtype)).any())).tolist()
        if other:
            raise ValueError("attention_mask must be 1 at tokens and 0 at padding, got other values")
        if holes:
            row = int((starts.sum(1) > 1).nonzero()[0])
            raise ValueError(
                f"attention_mask must be 1 over one stretch of each row (padding to its left or right), but row {row} has "
                "padding between tokens"
            )
    bounds = [0, *real.sum(1).cumsum(0).tolist()]
    return Layout("padded", tuple(ids.shape), bounds, ids.device, real.reshape(-1).nonzero()[:, 0])


def lay_out(
    sequences: TokenSequences,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
    name: str = "sequences",
) -> tuple[Tensor, Layout]:
    """The token ids end to end, (N,) int64, and their layout; arguments as for :func:`pack`."""
    if attention_mask is not None and not (isinstance(sequences, Tensor) and sequences.dim() == 2):
        raise ValueError("attention_mask is for padded ids of shape [S, T]; packed ids and lists have no padding to mask")
    if cu_seqlens is not None and not (isinstance(sequences, Tensor) and sequences.dim() == 1):
        raise ValueError("cu_seqlens is for packed ids of shape [N]; padded ids take attention_mask, and lists need neither")
    if not isinstance(sequences, Tensor):
        flat, lengths = _concatenated(name, sequences)
        flat = flat if device is None else flat.to(device)
        return flat, Layout("list", tuple(flat.shape), [0, *itertools.accumulate(lengths)], flat.device)
    check_integers(name, sequences)
    ids = sequences if device is None else sequences.to(device)
    if ids.dim() == 2:
        layout = _of_padded(ids, attention_mask)
        return layout.flatten(name, ids), layout
    if ids.dim() != 1 or cu_seqlens is None:
        raise ValueError(
            f"{name} must be padded [S, T], packed [N] with cu_seqlens, or a list, got a tensor of shape {tuple(ids.shape)}"
            f"{'' if ids.dim() != 1 else ' without cu_seqlens'}"
        )
    return ids.long(), Layout("packed", tuple(ids.shape), check_cu_seqlens(cu_seqlens, len(ids), ids.device), ids.device)
