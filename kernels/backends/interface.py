"""The interface of backends: what one is asked (:class:`Call`) and what it brings (:class:`Backend`, :class:`ElementWise`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..cost_model.costs import Cost

#: What a backend is asked to do: ``score`` alone; ``score`` with a tile, then ``tile_gradients``; ``score`` with
#: ``unit_dhidden``; ``recompute_gradients``, whose ``score`` is a call of its own.
Work = Literal["forward", "tile", "frozen", "recompute"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What a backend is asked to serve. The sizes are for predictions only; without them there are none.

    Attributes:
        device, dtype, weight_dtype: of the hidden states (as computed in) and the weight.
        num_tokens, hidden_size, vocab_size: N, H, V.
        outputs: token statistics besides the log-probabilities.
        work: see :data:`Work`.
        tiles: number of tiles into which the tokens of ``"tile"`` are divided.
        accumulate: whether dW is collected in float32.
        train_hidden, train_weight: which gradients are wanted, where ``work`` makes any.
        workspace: bytes for blocks of logits.
        architecture: of a GPU to plan for, which need not be present; ``None``: the device's.
        grad_filter: the size below which blocks of the gradient are left out, see ``settings``.
        by_rows: whether the weight is no plain tensor (LoRA, quantised), and is read by rows (``core/weight_rows.py``).
        batch_invariant: whether the choice of a backend must not depend on the number of tokens.
        sharded: whether the weight is one rank's rows of a head sharded over its vocabulary (``parallel=``).
    """

    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype
    num_tokens: int = 0
    hidden_size: int = 0
    vocab_size: int = 0
    outputs: frozenset[str] = frozenset()
    work: Work = "tile"
    tiles: int = 1
    accumulate: bool = False
    train_hidden: bool = True
    train_weight: bool = True
    workspace: int = 32 << 20
    architecture: str | None = None
    grad_filter: float = 0.0
    by_rows: bool = False
    batch_invariant: bool = False
    sharded: bool = False


@dataclass(frozen=True)
class ElementWise:
    """The functions of a backend that are not GEMMs. Each backend has all of them; most are borrowed from ``torch``.

    Attributes:
        target_logits: ``(x, weight, bias, labels, precision) -> (N,)``, raw logits of the labels by an indexed dot product.
        scan_block, gradient_block, finish_tile: the passes over blocks of logits of the blockwise algorithm
            (``backends/torch/blockwise.py``); arguments in ``backends/torch/passes.py``.
        mix_tile_: ``(tile, mix, k, head, options, *, transposed=False)``; turns exponentials into the gradient of a loss that
            depends on the entropy, in place. See ``backends/torch/entropy.py``.
        scatter_rows: ``(shape, dtype, rows, values, factor=None, base=None, distinct=True)``; a tensor of that shape (P, H)
            with ``values * factor + base`` at ``rows`` (N,) and 0 elsewhere. values, base (N, H); factor 0-dim or (N,).
            Rows that are not ``distinct`` are added up.
        scaled_to_dtype: ``(source, factor, dtype, in_place)``; ``(source * factor).to(dtype)`` without a full-size temporary.
            ``in_place`` may overwrite ``source``.
        segment_sum: ``(values, offsets)``, sums (S,) of ``values[offsets[j]:offsets[j + 1]]``, values (N,), offsets (S + 1,)
            int64. Added in float64 and in a fixed order, so every run gives the same bits. Not differentiable by itself: see
            ``tile/segments.py``.
        gae: ``(rewards, values, bounds, mask, gamma, decay, last_values, dtype)``, advantages and returns (N,) of packed
            segments ``bounds`` (S + 1,); ``decay`` is ``gamma * lam``. See ``fused/rl/gae.py``.
        pair_margins: a scalar function of the margin of each pair of sequences and its derivative per token, in one launch;
            see ``operators/schemas.py``. ``None`` where there is none: autograd does the same.
    """

    target_logits: Callable[..., Tensor]
    scan_block: Callable[..., Any]
    gradient_block: Callable[..., None]
    finish_tile: Callable[..., None]
    mix_tile_: Callable[..., None]
    scatter_rows: Callable[..., Tensor]
    scaled_to_dtype: Callable[..., Tensor]
    segment_sum: Callable[[Tensor, Tensor], Tensor]
    gae: Callable[..., tuple[Tensor, Tensor]]
    pair_margins: Callable[..., None] | None = None


def no_bytes(call: Call) -> int:
    """The ``workspace_bytes`` of a backend that stays within the budget."""
    return 0


@dataclass(frozen=True)
class Backend:
    """One implementation of the log-prob core.

    Attributes:
        name: its name in ``settings(backend=...)``.
        why_not: every reason why it cannot serve a call; empty if it can.
        why_unavailable: every reason why it cannot run on this machine.
        score, tile_gradients, recompute_gradients: see ``backends/torch/blockwise.py``.
        elementwise: its other functions.
        predict: what a call should cost on a GPU; ``None``: unknown.
        workspace_bytes: what it allocates for a call beyond ``Call.workspace``, whatever the memory budget.
        score_shard: see ``backends/torch/blockwise.py``. A backend without it cannot serve a call that is ``sharded``.
    """

    name: str
    why_not: Callable[[Call], list[str]]
    why_unavailable: Callable[[], list[str]]
    score: Callable[..., Any]
    tile_gradients: Callable[..., None]
    recompute_gradients: Callable[..., None]
    elementwise: ElementWise
    predict: Callable[[Call], Cost] | None = None
    workspace_bytes: Callable[[Call], int] = no_bytes
    score_shard: Callable[..., Any] | None = None


def unsupported(
    call: Call, *device_types: str, filters: bool = False, by_rows: bool = False, shards: bool = False
) -> list[str]:
    """The reasons that every backend shares: dtype, device type (none given: any), grad_filter unless it ``filters``, a
    weight with an adapter or in quantised form unless it reads such a weight ``by_rows``, and ``parallel=`` unless it scores
    ``shards``."""
    reasons = [] if call.dtype in DTYPES else [f"dtype {call.dtype} is not one of {DTYPES}"]
    if device_types and call.device.type not in device_types:
        reasons.append(f"device {call.device} is not one of type {' or '.join(device_types)}")
    if call.grad_filter and not filters:
        reasons.append(f"grad_filter={call.grad_filter} needs the triton backend")
    if call.by_rows and not by_rows:
        reasons.append("it reads the weight as one tensor, not as a LoRA or quantised weight is read, by rows")
    if call.sharded and not shards:
        reasons.append("it takes no label outside of the weight's rows, as parallel= needs")
    return reasons
