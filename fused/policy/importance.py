"""Importance weights that correct for a rollout engine whose log-probabilities differ from the trainer's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logitless.kernels.backends.registry import choose_elementwise

from ..bounds import LARGEST_ROOT
from ..checks import check_choice, check_number
from ..rl.checks import check_float, check_like
from ..rl.segments import Segments

#: What ``mode`` may be, as TRL names them.
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def check_clip(clip_min: float | None, clip_max: float | None, mode: str, prefix: str = "") -> None:
    """Bounds of the ratio must fit together and the mode; errors name them."""
    check_choice(prefix + "mode", mode, IMPORTANCE_SAMPLING_MODES)
    for name, value in (("clip_min", clip_min), ("clip_max", clip_max)):
        if value is not None:
            check_number(prefix + name, value, 0)
    if clip_min is not None and clip_max is not None and clip_min >= clip_max:
        raise ValueError(f"{prefix}clip_min must be less than {prefix}clip_max={clip_max}, got {clip_min}")
    if mode.endswith("_truncate") and clip_min is None and clip_max is None:
        raise ValueError(f"{prefix}clip_min or {prefix}clip_max must be given for {prefix}mode={mode!r}")


@torch.no_grad()
def importance_sampling_ratio(
    old_logps: Tensor,  # (N,) with cu_seqlens, or (S, T)
    sampling_logps: Tensor,  # like old_logps
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    mask: Tensor | None = None,  # like old_logps, bool
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """Truncated or masked importance weights ``exp(old_logps - sampling_logps)``, as TRL 1.16 computes them for vLLM.

    The trainer recomputes the log-probabilities of the tokens that a rollout engine sampled; the two differ by kernels and
    precision. The weight multiplies each token's loss: pass it to a policy loss as ``importance_sampling_ratio``. It is at most
    ``exp(40)``, also without ``clip_max``.

    Args:
        old_logps: the trainer's, before any update; padded ``[S, T]``, or packed ``[N]`` with ``cu_seqlens``.
        sampling_logps: the engine's; NaN where it has none, for no correction.
        cu_seqlens: int32 or int64, where each packed sequence starts and ends.
        mask: the tokens that count. Values at the others are ignored.
        mode: ``"token_..."`` for one weight per token, ``"sequence_..."`` for one per sequence, the product over its tokens;
            ``"..._truncate"`` clamps weights to the range, ``"..._mask"`` sets those outside of it to 0.
        clip_min, clip_max: the range; ``None`` for no bound.

    Returns:
        Tensor: shaped like ``old_logps`` (1 at masked positions), or ``[S]`` for ``"sequence_..."``; at least float32.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> old, sampled = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -4.0]])
        >>> importance_sampling_ratio(old, sampled, mode="token_truncate", clip_max=2.0)
        tensor([[1., 2.]])
        >>> importance_sampling_ratio(old, sampled)
        tensor([0.])
    """
    check_float("old_logps", old_logps)
    check_like("sampling_logps", sampling_logps, old_logps, "old_logps")
    check_clip(clip_min, clip_max, mode)
    segments = Segments.of("old_logps", old_logps, cu_seqlens, mask)
    add = choose_elementwise(old_logps.device, "segment_sum").segment_sum
    return importance_weights(old_logps, sampling_logps, segments, mode=mode, clip_min=clip_min, clip_max=clip_max, add=add)


def importance_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    segments: Segments,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
    add: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """:func:`importance_sampling_ratio` without its checks. ``add``: a backend's ``segment_sum``."""
    dtype = torch.promote_types(old_logps.dtype, torch.float32)
    wide = torch.float32 if old_logps.device.type == "mps" else torch.float64
    difference = segments.pack(old_logps).to(wide) - segments.pack(sampling_logps).to(wide)
    difference = torch.nan_to_num(difference, nan=0.0)
    if mode.startswith("sequence_"):
        difference = add(difference, segments.offsets)
    ratio = difference.exp().clamp(max=LARGEST_ROOT)
    if mode.endswith("_truncate"):
        ratio = ratio.clamp(clip_min, clip_max)
    else:
        outside = torch.zeros_like(ratio, dtype=torch.bool)
        outside = outside if clip_min is None else outside | (ratio < clip_min)
        outside = outside if clip_max is None else outside | (ratio > clip_max)
        ratio = ratio.masked_fill(outside, 0)
    ratio = ratio.to(dtype)
    if mode.startswith("sequence_") or segments.kept is None:
        return ratio if mode.startswith("sequence_") else ratio.view(old_logps.shape)
    out = torch.ones(old_logps.numel(), dtype=dtype, device=old_logps.device)
    return out.index_copy_(0, segments.kept, ratio).view(old_logps.shape)
