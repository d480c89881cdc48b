"""Attention of sequences in one row: FlashAttention where it is installed, else torch's own variable-length attention.

torch's (2.11 and later, on CUDA) runs FlashAttention's kernels and, unlike flex attention, compiles nothing for each new
length. It is registered here, because transformers has no name for it.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor, nn

#: The implementation for a padded batch.
PADDED = "sdpa"
#: ``logitless.model_logps`` passes the bounds of sequences to an implementation with "varlen" in its name; for names with
#: "flash" transformers finds the bounds itself.
VARLEN = "torch_varlen"
_PACKAGES = (("flash_attention_3", "flash_attn_interface"), ("flash_attention_2", "flash_attn"))


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a row, or within the whole row where no bounds are given.

    query (1, heads, tokens, D); key and value (1, key heads, tokens, D) -> (1, tokens, heads, D). Of transformers' options it
    reads ``scaling``, ``sliding_window``, ``cu_seq_lens_q`` and ``max_length_q``.
    """
    from torch.nn.attention.varlen import varlen_attn

    if len(query) != 1 or attention_mask is not None:
        raise ValueError(f"{VARLEN} takes one row without a mask, got {len(query)} rows")
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    bounds, longest = options.get("cu_seq_lens_q"), options.get("max_length_q") or tokens
    if bounds is None:
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=query.device)
    # torch 2.11 needs as many heads of keys as of queries
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
    if q.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type):  # after a norm; sdpa casts by itself
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    window = ((options.get("sliding_window") or 0) - 1, 0)  # -1: no window
    out: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=options.get("scaling"), window_size=window)
    return out[None], None


def register() -> None:
    """Register :data:`VARLEN` with transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)


def in_one_row(device: torch.device) -> str:
    """The implementation for sequences in one row on a device."""
    if device.type == "cpu":
        return PADDED
    for name, package in _PACKAGES:
        if importlib.util.find_spec(package):
            return name
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in inspect.signature(varlen_attn).parameters:  # which makes it causal
            return VARLEN
    return "flex_attention"
