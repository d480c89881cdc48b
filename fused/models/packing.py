"""Packs sequences of different lengths end to end without padding, and unpacks them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.core.checks import check_cu_seqlens, check_ignore_index, check_tensor

from .layout import Layout, TokenSequences, check_integers, lay_out


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """S sequences with N tokens in total, laid end to end. Made by :func:`pack`.

    Attributes:
        input_ids: (N,) int64.
        position_ids: (N,) int64, 0, 1, 2 ... in each sequence.
        cu_seqlens: (S + 1,) int32, where each sequence starts and ends.
        max_seqlen: number of tokens of the longest sequence.
        labels: (N,) int64, shifted as all operations of this library take them: ``labels[i]`` is the token that position i
            predicts, and ``ignore_index`` at the last token of each sequence and where nothing is scored. ``None``: every token
            but the first of each sequence is scored.
        ignore_index: the label of positions that are not scored.

    Raises:
        TypeError, ValueError: naming the field, when the shapes or dtypes do not fit together.

    Example:
        >>> packed = pack([[5, 6, 7], [8, 9]], prompt_lengths=[2, 0])
        >>> packed.position_ids.tolist(), packed.cu_seqlens.tolist(), packed.labels.tolist()
        ([0, 1, 2, 0, 1], [0, 3, 5], [-100, 7, -100, 9, -100])
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        for name in ("input_ids", "position_ids", "labels"):
            value = getattr(self, name)
            if name == "labels" and value is None:
                continue
            check_tensor(name, value)
            if value.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {value.dtype}")
            if value.dim() != 1 or len(value) != len(self.input_ids):
                raise ValueError(f"{name} must have shape [N], one value per token, got {tuple(value.shape)}")
        check_tensor("cu_seqlens", self.cu_seqlens)
        if self.cu_seqlens.dtype != torch.int32 or self.cu_seqlens.dim() != 1 or len(self.cu_seqlens) < 1:
            raise ValueError(
                f"cu_seqlens must be int32 of shape [num_sequences + 1], got {self.cu_seqlens.dtype} "
                f"{tuple(self.cu_seqlens.shape)}"
            )
        check_ignore_index(self.ignore_index)

    @property
    def num_sequences(self) -> int:
        """S, sequences without tokens included."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (S,) int32."""
        return self.cu_seqlens.diff()

    @property
    def mask(self) -> Tensor:
        """Which positions are scored, (N,) bool: the mask for advantages, rewards and values of tokens."""
        if self.labels is not None:
            return self.labels != self.ignore_index
        last = torch.ones_like(self.input_ids, dtype=torch.bool)  # the last token of a sequence predicts none
        last[:-1] = self.position_ids[1:] == 0
        return ~last

    def to(self, device: torch.device | str) -> PackedSequences:
        """A copy on a device."""
        moved: dict[str, Any] = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    def model_inputs(self, *, flash_attention: bool = False) -> dict[str, Any]:
        """Keyword arguments for a Hugging Face model that runs the pack as one row.

        They contain no attention mask: without a mask and without a cache, transformers tells the sequences apart by their
        position ids. Some models do not (see :func:`logitless.models.why_not_padding_free`).

        Args:
            flash_attention: also pass ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32), ``max_length_q`` and ``max_length_k``,
                so that FlashAttention need not derive them from the position ids in every layer. Sequences without tokens are
                left out.

        Example:
            >>> inputs = pack([[5, 6, 7], [8, 9]]).model_inputs()
            >>> {name: tuple(value.shape) for name, value in inputs.items()}
            {'input_ids': (1, 5), 'position_ids': (1, 5)}
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids[None], "position_ids": self.position_ids[None]}
        if flash_attention:
            bounds = self.cu_seqlens.unique_consecutive()
            inputs.update(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
            inputs.update(max_length_q=self.max_seqlen, max_length_k=self.max_seqlen)
        return inputs

    def unpack(
        self,
        values: Tensor,  # (N, ...)
        *,
        padded: bool = False,
        padding_value: float = 0,
        padding_side: str = "right",
        max_seqlen: int | None = None,
    ) -> list[Tensor] | Tensor:
        """:func:`unpack` with this pack's ``cu_seqlens``."""
        return unpack(
            values,
            self.cu_seqlens,
            padded=padded,
            padding_value=padding_value,
            padding_side=padding_side,
            max_seqlen=max_seqlen,
        )


def make_pack(
    ids: Tensor,  # (N,)
    layout: Layout,
    labels: Any = None,
    prompt_lengths: Any = None,
    ignore_index: int = -100,
) -> PackedSequences:
    """:func:`pack`, given the result of :func:`lay_out`."""
    check_ignore_index(ignore_index)
    if labels is not None and prompt_lengths is not None:
        raise ValueError("labels and prompt_lengths both say which tokens are scored: pass one of them")
    bounds, device = layout.bounds, layout.device
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int64, device=device)
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=len(ids))
    positions = torch.arange(len(ids), device=device) - starts
    targets = ids if labels is None else layout.flatten("labels", labels)
    scored = positions > 0  # no position predicts the first token of a sequence
    if prompt_lengths is not None:
        prompts = _checked_prompts(prompt_lengths, sizes)
        scored &= positions >= torch.repeat_interleave(prompts.to(device), lengths, output_size=len(ids))
    targets = torch.where(scored, targets, ignore_index)
    # position i predicts token i + 1; after the last token of a sequence, that is the first token of the next one: not scored
    shifted = torch.cat((targets[1:], targets.new_full((min(1, len(ids)),), ignore_index)))
    return PackedSequences(ids, positions, cu_seqlens.int(), max(sizes, default=0), shifted, ignore_index)


def _checked_prompts(prompt_lengths: Any, sizes: list[int]) -> Tensor:
    prompts = prompt_lengths if isinstance(prompt_lengths, Tensor) else torch.tensor(list(prompt_lengths), device="cpu")
    if prompts.numel() == 0 and not isinstance(prompt_lengths, Tensor):
        prompts = prompts.long()
    check_integers("prompt_lengths", prompts)
    if tuple(prompts.shape) != (len(sizes),):
        raise ValueError(f"prompt_lengths must have one value per sequence, shape [{len(sizes)}], got {tuple(prompts.shape)}")
    bad = ((prompts < 0) | (prompts > torch.tensor(sizes, dtype=torch.int64, device=prompts.device))).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"prompt_lengths[{i}] must be between 0 and its sequence's {sizes[i]} tokens, got {int(prompts[i])}")
    return prompts.long()


def pack(
    sequences: TokenSequences,
    *,
    attention_mask: Tensor | None = None,  # (S, T)
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    labels: TokenSequences | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,  # (S,)
    ignore_index: int = -100,
    device: torch.device | str | None = None,
) -> PackedSequences:
    """Lay sequences end to end, without padding.

    Args:
        sequences: token ids, int32 or int64: a list of 1-D tensors or of lists of ints; padded ``[S, T]`` with
            ``attention_mask``; or packed ``[N]`` with ``cu_seqlens``. Sequences may have no or one token.
        attention_mask: (S, T) bool or integer, 1 over one stretch of each row. ``None``: no padding.
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to N.
        labels: as in Hugging Face, not shifted, and laid out like the sequences: the token itself where it is scored, else
            ``ignore_index``. ``None``: every token is scored.
        prompt_lengths: (S,) number of tokens at the start of each sequence that are not scored; an alternative to ``labels``.
        ignore_index: the label of tokens that are not scored, in ``labels`` and in the result.
        device: device of the result; ``None``: that of the sequences.

    Returns:
        PackedSequences: with labels shifted by one inside each sequence. The first token of a sequence is never scored.

    Raises:
        TypeError, ValueError: naming the argument; for ids that are not integers, lengths that differ, a mask with holes, and
            a prompt longer than its sequence.

    Example:
        >>> mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
        >>> pack(torch.tensor([[5, 6, 7], [0, 8, 9]]), attention_mask=mask).labels
        tensor([   6,    7, -100,    9, -100])
    """
    ids, layout = lay_out(sequences, attention_mask, cu_seqlens, device)
    return make_pack(ids, layout, labels, prompt_lengths, ignore_index)


def unpack(
    values: Tensor,  # (N, ...)
    cu_seqlens: Tensor,  # (S + 1,)
    *,
    padded: bool = False,
    padding_value: float = 0,
    padding_side: str = "right",
    max_seqlen: int | None = None,
) -> list[Tensor] | Tensor:
    """Split packed values into sequences. Differentiable and exact.

    Args:
        values: (N, ...) of any dtype.
        cu_seqlens: (S + 1,) int32 or int64, rising from 0 to N.
        padded: return one tensor ``[S, T, ...]``; otherwise a list of S views.
        padding_value: value at padding.
        padding_side: ``"right"`` or ``"left"``.
        max_seqlen: T, at least the length of the longest sequence, which is the default.

    Raises:
        TypeError, ValueError: naming the argument; also for an argument about padding when ``padded`` is False.

    Example:
        >>> unpack(torch.arange(5), torch.tensor([0, 3, 5]), padded=True, padding_value=-1, padding_side="left")
        tensor([[ 0,  1,  2],
                [-1,  3,  4]])
    """
    check_tensor("values", values)
    if values.dim() < 1:
        raise ValueError("values must have shape [N, ...], got a 0-dim tensor")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    bounds = check_cu_seqlens(cu_seqlens, len(values), values.device)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    if not padded:
        if padding_value != 0 or padding_side != "right" or max_seqlen is not None:
            raise ValueError("padding_value, padding_side and max_seqlen are about padding: pass padded=True with them")
        return list(values.split(sizes)) if sizes else []
    longest = max(sizes, default=0)
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < longest):
        raise ValueError(f"max_seqlen must be an int of at least the longest sequence's {longest} tokens, got {max_seqlen!r}")
    width = longest if max_seqlen is None else max_seqlen
    lengths = torch.tensor(sizes, dtype=torch.int64, device=values.device)
    offsets = torch.arange(len(sizes), device=values.device) * width - torch.tensor(
        bounds[:-1], dtype=torch.int64, device=values.device
    )
    if padding_side == "left":
        offsets = offsets + width - lengths
    where = torch.arange(len(values), device=values.device)
    where += torch.repeat_interleave(offsets, lengths, output_size=len(values))
    rest = values.shape[1:]
    out = values.new_full((len(sizes) * width, *rest), padding_value)
    return out.index_copy(0, where, values).view(len(sizes), width, *rest)
